"""Contrastive preference optimization: the policy's own scores of two answers, without a reference.

Comes in: preference pairs, then a Batch and the model's output.  Goes out: rows, then Loss (sum over pairs).
Source: Xu et al. 2024; names and formulas are those of trl 1.16 (its mean over tokens is here the whole step's).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tunekit.contracts import Tokenizer
from tunekit.objectives.pairs import PairObjective, Scores, smoothed
from tunekit.recipe.objectives.cpo import CpoSettings


class Cpo(PairObjective):
    """loss = sum over pairs of f(chosen - rejected) + cpo_alpha times the mean loss of the step's chosen tokens. f is
    smoothed(beta x), max(0, 1 - beta x), or of the means over tokens (x - 1 / (2 beta))^2."""

    def __init__(self, settings: CpoSettings, tokenizer: Tokenizer) -> None:
        super().__init__(settings, tokenizer)
        self.settings, self.likelihood = settings, settings.cpo_alpha
        self.averages = settings.loss_type == "ipo"

    def losses(self, scores: Scores) -> Tensor:
        """(P,) of each pair."""
        beta, apart = self.beta, scores.chosen - scores.rejected
        if self.settings.loss_type == "ipo":
            return (apart - 1 / (2 * beta)) ** 2
        if self.settings.loss_type == "hinge":
            return torch.relu(1 - beta * apart)
        return smoothed(beta * apart, self.settings.label_smoothing)


def make(settings: CpoSettings, processor: Tokenizer, facts: Mapping[str, Any]) -> Cpo:
    """The objective of `objective: cpo`."""
    return Cpo(settings, processor)
