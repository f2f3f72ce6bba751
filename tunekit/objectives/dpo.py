"""Direct preference optimization: of two answers the policy learns the preferred one, held to the model at step 0.

Comes in: preference pairs, then a Batch and the model's output.  Goes out: rows, then Loss (sum over pairs).
Source: Rafailov et al. 2023; the names and formulas of the losses are those of trl 1.16.  What differs by design: a
batch is the whole step, on all ranks, where trl takes each micro-batch by itself (aot, sft), so that micro-batches
change nothing; what the template writes after the end-of-turn token is no part of an answer; the reference is computed
without dropout, and dropout of the policy is the recipe's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tunekit.contracts import Gather, Tokenizer, Window
from tunekit.objectives.pairs import PairObjective, Scores, smoothed
from tunekit.recipe.objectives.dpo import DpoSettings


def sigmoid(scores: Scores, settings: DpoSettings) -> Tensor:
    """-log s(beta m), s the logistic function, m = log-ratio of the chosen less the rejected answer. Eq. 7."""
    return -logsigmoid(settings.beta * scores.margin)


def hinge(scores: Scores, settings: DpoSettings) -> Tensor:
    """max(0, 1 - beta m). Zhao et al. 2023 (SLiC), with the reference's scores."""
    return torch.relu(1 - settings.beta * scores.margin)


def ipo(scores: Scores, settings: DpoSettings) -> Tensor:
    """(m' - 1 / (2 beta))^2, where m' is of the means over each answer's tokens. Azar et al. 2023, eq. 17."""
    means = scores.chosen_ratio / scores.chosen_tokens - scores.rejected_ratio / scores.rejected_tokens
    return (means - 1 / (2 * settings.beta)) ** 2


def robust(scores: Scores, settings: DpoSettings) -> Tensor:
    """Unbiased where a share e of the preferences is flipped: (e log s(-b m) - (1 - e) log s(b m)) / (1 - 2 e).
    Chowdhury et al. 2024, eq. 11."""
    share, logits = settings.label_smoothing, settings.beta * scores.margin
    return (share * logsigmoid(-logits) - (1 - share) * logsigmoid(logits)) / (1 - 2 * share)


def exo_pair(scores: Scores, settings: DpoSettings) -> Tensor:
    """KL of the policy's preference (s(b m), s(-b m)) from (1 - e, e). Ji et al. 2024, eq. 16."""
    share, logits = torch.tensor(settings.label_smoothing), settings.beta * scores.margin
    kept = logits.sigmoid() * (logsigmoid(logits) - torch.log1p(-share))
    return kept + (-logits).sigmoid() * (logsigmoid(-logits) - share.log())


def nca_pair(scores: Scores, settings: DpoSettings) -> Tensor:
    """-log s(c) - (log s(-c) + log s(-r)) / 2, c and r being beta times the log-ratios. Chen et al. 2024."""
    chosen, rejected = settings.beta * scores.chosen_ratio, settings.beta * scores.rejected_ratio
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def apo_zero(scores: Scores, settings: DpoSettings) -> Tensor:
    """1 - s(c) + s(r): for answers better than the model's own. D'Oosterlinck et al. 2024, eq. 7."""
    return 1 - (settings.beta * scores.chosen_ratio).sigmoid() + (settings.beta * scores.rejected_ratio).sigmoid()


def apo_down(scores: Scores, settings: DpoSettings) -> Tensor:
    """s(c) + 1 - s(b m): for answers worse than the model's own. D'Oosterlinck et al. 2024, eq. 8."""
    return (settings.beta * scores.chosen_ratio).sigmoid() + 1 - (settings.beta * scores.margin).sigmoid()


def discopop(scores: Scores, settings: DpoSettings) -> Tensor:
    """(1 - w) (-log s(b m)) + w exp(-b m), w = s(b m / tau). Lu et al. 2024, eq. 5."""
    logits = settings.beta * scores.margin
    share = (logits / settings.discopop_tau).sigmoid()
    return -logsigmoid(logits) * (1 - share) + (-logits).exp() * share


def sppo_hard(scores: Scores, settings: DpoSettings) -> Tensor:
    """(c' - 1 / (2 beta))^2 + (r' + 1 / (2 beta))^2 of the log-ratios themselves. Wu et al. 2024, eq. 4.7."""
    half = 0.5 / settings.beta
    return (scores.chosen_ratio - half) ** 2 + (scores.rejected_ratio + half) ** 2


def aot(scores: Scores, settings: DpoSettings) -> Tensor:
    """The sigmoid loss (smoothed) of each preference of the policy and that of the reference which has its rank in the
    step. Melnyk et al. 2024."""
    return smoothed(settings.beta * (scores.chosen - scores.rejected - scores.matched), settings.label_smoothing)


def sft(scores: Scores, settings: DpoSettings) -> Tensor:
    """Nothing of a pair: the mean loss of the step's chosen tokens is in `likelihood`. Pang et al. 2024 (RPO)."""
    return torch.zeros_like(scores.chosen)


LOSSES: dict[str, Callable[[Scores, DpoSettings], Tensor]] = {
    loss.__name__: loss
    for loss in (sigmoid, hinge, ipo, robust, exo_pair, nca_pair, apo_zero, apo_down, discopop, sppo_hard, aot, sft)
}


class Dpo(PairObjective):
    """loss = sum over pairs of the weighted losses; the reference is scored in `prepare`."""

    def __init__(self, settings: DpoSettings, tokenizer: Tokenizer) -> None:
        super().__init__(settings, tokenizer)
        self.settings, self.weighted = settings, settings.weighted_losses
        self.likelihood = sum(weight for name, weight in self.weighted if name == "sft")

    def losses(self, scores: Scores) -> Tensor:
        """(P,) of each pair."""
        return torch.stack([weight * LOSSES[name](scores, self.settings) for name, weight in self.weighted]).sum(0)

    def weights(self, counts: Tensor) -> Tensor | None:
        """ld_alpha for the tokens of an answer beyond the length of the shorter one. Liu et al. 2024."""
        alpha = self.settings.ld_alpha
        if alpha is None:
            return None
        shared = counts.view(2, -1).amin(0).repeat(2).tolist()
        kept = zip(counts.tolist(), shared, strict=True)
        return torch.cat([torch.where(torch.arange(count) < least, 1.0, alpha) for count, least in kept])

    def prepare(self, model: Any, window: Window, gather: Gather = list) -> Window:
        """Also, for aot, the reference's preference that each pair's own is compared with: of its rank in the step."""
        window = super().prepare(model, window, gather)
        if "aot" not in self.settings.loss_type:
            return window
        found = model.scored(window.batches, self.scored)
        each = [np.subtract(*scores.numpy().reshape(2, -1)) for scores in found]
        own = np.concatenate([np.empty(0, np.float32), *each])  # (pairs,) of this rank, which may have none
        theirs = [float(np.subtract(*row.parts["reference"])) for batch in window.batches for row in batch.rows]
        policy, reference = np.sort(gather(own.tolist())), np.sort(gather(theirs)).astype(np.float32)
        order, ranks = np.argsort(own, kind="stable"), np.empty(len(own), np.int64)
        equals = np.arange(len(own)) - np.searchsorted(own[order], own[order])  # how many before it are the same
        ranks[order] = np.searchsorted(policy, own[order]) + equals
        matched = iter(reference[ranks])
        parts = [np.array([next(matched) for _ in batch.rows]) for batch in window.batches]
        return self.with_all(window, [{"matched": part} for part in parts])


def make(settings: DpoSettings, processor: Tokenizer, facts: Mapping[str, Any]) -> Dpo:
    """The objective of `objective: dpo`."""
    return Dpo(settings, processor)
