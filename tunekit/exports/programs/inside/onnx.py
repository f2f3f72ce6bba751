"""Conversion of a model folder by optimum, and log-probabilities of the result in ONNX Runtime."""

from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime import InferenceSession

NUMBERS = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Convert a model and return nothing, or return all log-probabilities of rows, as the request says."""
    if "output" in request:
        from optimum.exporters.onnx import main_export

        main_export(request["model"], request["output"], task="text-generation-with-past", do_validation=False)
        return {}
    session = InferenceSession(str(Path(request["model"]) / "model.onnx"), providers=["CPUExecutionProvider"])
    answers = {}
    for index, row in enumerate(request["rows"]):
        logits = session.run(["logits"], _inputs(session, row))[0][0].astype(np.float64)
        answers[f"values.{index}"] = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    return answers


def _inputs(session: InferenceSession, row: list[int]) -> dict[str, Any]:
    """The inputs for a whole row, with an empty key-value cache."""
    tokens = {"input_ids": row, "attention_mask": [1] * len(row), "position_ids": list(range(len(row)))}
    inputs = {}
    for each in session.get_inputs():
        if each.name in tokens:
            inputs[each.name] = np.array([tokens[each.name]], np.int64)
        else:
            sizes = {"batch_size": 1}
            shape = [size if isinstance(size, int) else sizes.get(size, 0) for size in each.shape]
            inputs[each.name] = np.zeros(shape, NUMBERS[each.type])
    return inputs
