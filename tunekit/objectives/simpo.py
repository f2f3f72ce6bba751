"""Simple preference optimization: mean log-probabilities of two answers, a margin apart, without a reference.

Comes in: preference pairs, then a Batch and the model's output.  Goes out: rows, then Loss (sum over pairs).
Source: Meng et al. 2024, eq. 6; names and formulas are those of trl 1.16's CPO trainer with loss_type simpo.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tunekit.contracts import Tokenizer
from tunekit.objectives.pairs import PairObjective, Scores, smoothed
from tunekit.recipe.objectives.simpo import SimpoSettings


class Simpo(PairObjective):
    """loss = sum over pairs of -log s(beta (chosen - rejected) - gamma), of means over each answer's tokens."""

    averages = True

    def __init__(self, settings: SimpoSettings, tokenizer: Tokenizer) -> None:
        super().__init__(settings, tokenizer)
        self.settings, self.likelihood = settings, settings.cpo_alpha

    def losses(self, scores: Scores) -> Tensor:
        """(P,) of each pair."""
        apart = self.beta * (scores.chosen - scores.rejected) - self.settings.simpo_gamma
        return smoothed(apart, self.settings.label_smoothing)


def make(settings: SimpoSettings, processor: Tokenizer, facts: Mapping[str, Any]) -> Simpo:
    """The objective of `objective: simpo`."""
    return Simpo(settings, processor)
