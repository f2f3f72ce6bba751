"""Log-probabilities of a model folder in mlx-lm, with or without an adapter in mlx-lm's layout."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_adapters, load_model


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """All log-probabilities of the rows, computed in float32."""
    model, _ = load_model(Path(request["model"]))
    if request["adapter"]:
        model = load_adapters(model, request["adapter"])
    model.set_dtype(mx.float32)
    model.eval()
    answers = {}
    for index, row in enumerate(request["rows"]):
        logits = model(mx.array([row]))[0]
        answers[f"values.{index}"] = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    return answers
