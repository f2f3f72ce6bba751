"""What every objective shares.

Comes in: a settings object.  Goes out: an Objective (protocols.py), found by its name: `objective: sft` is sft.py.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from tunekit.contracts import Batch, Objective, Window
from tunekit.objectives.logprobs import supervised_positions


def make_objective(settings: Any, *, logits_chunk_tokens: int) -> Objective:
    """The objective named by `settings.method`, whose file has a function `make`."""
    module = importlib.import_module(f"tunekit.objectives.{settings.method}")
    objective: Objective = module.make(settings, logits_chunk_tokens)
    return objective


class Supervised:
    """What objectives over the supervised tokens of rows share: loss = sum over them, divided by the step's number."""

    needs_reference = False

    def __init__(self, logits_chunk_tokens: int) -> None:
        self.logits_chunk_tokens = logits_chunk_tokens

    def prepare(self, model: object, window: Window) -> Window:
        """Nothing to prepare."""
        return window

    def units(self, batch: Batch) -> Tensor:
        """(1,) float64: supervised tokens that are predicted; a row's first token never is."""
        return torch.tensor([float(len(supervised_positions(batch.labels)[0]))], dtype=torch.float64)
