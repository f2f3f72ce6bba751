"""Log-probabilities of a converted Whisper in CTranslate2."""

from typing import Any

import numpy as np
from ctranslate2 import StorageView
from ctranslate2.models import Whisper


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """All log-probabilities of the rows, which begin with the token for "no timestamps".

    The row is a part of the prompt. CTranslate2 also gives logits for prompt tokens after "no timestamps", so one call
    gives the logits after each token of the row.
    """
    model = Whisper(request["model"], device="cpu", compute_type="default")
    answers = {}
    for index, row in enumerate(request["rows"]):
        prompt = [*request["prompts"][index], *row]
        result = model.generate(
            StorageView.from_array(request[f"features.{index}"][None]),
            [prompt],
            beam_size=1,
            max_length=2 * (len(prompt) + 1),  # it generates half of these
            suppress_blank=False,
            suppress_tokens=[],
            return_logits_vocab=True,
        )[0]
        logits = np.stack([np.array(step, np.float64).reshape(-1) for step in result.logits[0][: len(row)]])
        answers[f"values.{index}"] = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    return answers
