"""Odds ratio preference optimization: supervised tuning on chosen answers, with the odds of the others beside it.

Comes in: preference pairs, then a Batch and the model's output.  Goes out: rows, then Loss (sum over pairs).
Source: Hong et al. 2024, eq. 6 and 7; names and formulas are those of trl 1.16, so that the mean loss is of the chosen
answers with their prompts (here of the whole step).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tunekit.contracts import Tokenizer
from tunekit.objectives.pairs import PairObjective, Scores
from tunekit.recipe.objectives.orpo import OrpoSettings


class Orpo(PairObjective):
    """loss = the mean loss of the chosen sequences - beta log s(log odds(chosen) - log odds(rejected)), where
    odds = p / (1 - p) and log p is the mean over an answer's tokens."""

    averages, prompts, likelihood = True, True, 1.0

    def __init__(self, settings: OrpoSettings, tokenizer: Tokenizer) -> None:
        super().__init__(settings, tokenizer)

    def losses(self, scores: Scores) -> Tensor:
        """(P,) of each pair."""
        return -self.beta * logsigmoid(log_odds(scores.chosen) - log_odds(scores.rejected))


def log_odds(logp: Tensor) -> Tensor:
    """log p - log(1 - p), each side of p = 1/2 by the formula that is exact there; p = 1 is kept off by a rounding."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.where(logp < -math.log(2), torch.log1p(-logp.exp()), (-torch.expm1(logp)).log())


def make(settings: OrpoSettings, processor: Tokenizer, facts: Mapping[str, Any]) -> Orpo:
    """The objective of `objective: orpo`."""
    return Orpo(settings, processor)
