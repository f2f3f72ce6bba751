"""Log-probabilities of a model folder in transformers 4."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """All log-probabilities of the rows, computed in float32. The tokenizer is loaded too, to check that this is
    possible."""
    AutoTokenizer.from_pretrained(request["model"], trust_remote_code=False)
    folder = request["model"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    model.eval()
    with torch.no_grad():
        return {
            f"values.{index}": model(torch.tensor([row])).logits[0].log_softmax(-1).numpy()
            for index, row in enumerate(request["rows"])
        }
