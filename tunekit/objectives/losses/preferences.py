"""Formulas of preference optimization: DPO and its variants, CPO, SimPO, ORPO. Each function takes Scores and returns
(P,) losses.

Names and formulas are the same as in trl 1.16, with three differences:

- aot, sft and mean losses are computed over the whole step on all ranks, so that micro-batches do not change them. trl
  computes them for each micro-batch.
- An answer ends with the end-of-turn token.
- The reference is computed without dropout. The recipe sets the dropout of the policy.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tunekit.objectives.losses.pairs import Scores
from tunekit.recipe.objectives.cpo import CpoSettings
from tunekit.recipe.objectives.dpo import DpoSettings
from tunekit.recipe.objectives.orpo import OrpoSettings
from tunekit.recipe.objectives.simpo import SimpoSettings


def sigmoid(scores: Scores, settings: DpoSettings) -> Tensor:
    """-log s(beta m), where s is the logistic function, and m the margin: chosen log-ratio minus rejected log-ratio.
    DPO, eq. 7."""
    return -logsigmoid(settings.beta * scores.margin)


def hinge(scores: Scores, settings: DpoSettings) -> Tensor:
    """max(0, 1 - beta m), where m is the margin of log-ratios. Zhao et al. 2023 (SLiC), but m includes the reference's
    scores."""
    return torch.relu(1 - settings.beta * scores.margin)


def ipo(scores: Scores, settings: DpoSettings) -> Tensor:
    """(m - 1 / (2 beta))^2, where m is the margin of log-ratios, each divided by its answer's number of tokens. Azar et
    al. 2023, eq. 17."""
    means = scores.chosen_ratio / scores.chosen_tokens - scores.rejected_ratio / scores.rejected_tokens
    return (means - 1 / (2 * settings.beta)) ** 2


def robust(scores: Scores, settings: DpoSettings) -> Tensor:
    """(e log s(-x) - (1 - e) log s(x)) / (1 - 2 e), where x is beta times the margin. The loss is unbiased if a share e
    of the preferences is flipped. Chowdhury et al. 2024, eq. 11."""
    share, logits = settings.label_smoothing, settings.beta * scores.margin
    return (share * logsigmoid(-logits) - (1 - share) * logsigmoid(logits)) / (1 - 2 * share)


def exo_pair(scores: Scores, settings: DpoSettings) -> Tensor:
    """KL of the policy's preference (s(x), s(-x)) from (1 - e, e), where x is beta times the margin, and e is
    label_smoothing. Ji et al. 2024, eq. 16."""
    share, logits = torch.tensor(settings.label_smoothing), settings.beta * scores.margin
    kept = logits.sigmoid() * (logsigmoid(logits) - torch.log1p(-share))
    return kept + (-logits).sigmoid() * (logsigmoid(-logits) - share.log())


def nca_pair(scores: Scores, settings: DpoSettings) -> Tensor:
    """-log s(c) - (log s(-c) + log s(-r)) / 2, where c and r are beta times the log-ratios of the chosen and the
    rejected answer. Chen et al. 2024."""
    chosen, rejected = settings.beta * scores.chosen_ratio, settings.beta * scores.rejected_ratio
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def apo_zero(scores: Scores, settings: DpoSettings) -> Tensor:
    """1 - s(c) + s(r), where c and r are beta times the log-ratios of the chosen and the rejected answer. For data
    whose answers are better than the model's. D'Oosterlinck et al. 2024, eq. 7."""
    return 1 - (settings.beta * scores.chosen_ratio).sigmoid() + (settings.beta * scores.rejected_ratio).sigmoid()


def apo_down(scores: Scores, settings: DpoSettings) -> Tensor:
    """s(c) + 1 - s(x), where c is beta times the chosen log-ratio, and x is beta times the margin. For data whose
    answers are worse than the model's. D'Oosterlinck et al. 2024, eq. 8."""
    return (settings.beta * scores.chosen_ratio).sigmoid() + 1 - (settings.beta * scores.margin).sigmoid()


def discopop(scores: Scores, settings: DpoSettings) -> Tensor:
    """(1 - w) (-log s(x)) + w exp(-x), where x is beta times the margin, and w = s(x / tau). Lu et al. 2024, eq. 5."""
    logits = settings.beta * scores.margin
    share = (logits / settings.discopop_tau).sigmoid()
    return -logsigmoid(logits) * (1 - share) + (-logits).exp() * share


def sppo_hard(scores: Scores, settings: DpoSettings) -> Tensor:
    """(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2, where c and r are the log-ratios of the chosen and the rejected
    answer. Wu et al. 2024, eq. 4.7."""
    half = 0.5 / settings.beta
    return (scores.chosen_ratio - half) ** 2 + (scores.rejected_ratio + half) ** 2


def aot(scores: Scores, settings: DpoSettings) -> Tensor:
    """The smoothed sigmoid loss of x = beta (policy's preference - reference's preference). The reference's preference
    comes from the pair with the same rank in the step. Melnyk et al. 2024."""
    return smoothed(settings.beta * (scores.chosen - scores.rejected - scores.matched), settings.label_smoothing)


def sft(scores: Scores, settings: DpoSettings) -> Tensor:
    """Zeros, because `likelihood` already contains the mean loss of the step's chosen tokens. Pang et al. 2024
    (RPO)."""
    return torch.zeros_like(scores.chosen)


LOSSES: dict[str, Callable[[Scores, DpoSettings], Tensor]] = {
    loss.__name__: loss
    for loss in (sigmoid, hinge, ipo, robust, exo_pair, nca_pair, apo_zero, apo_down, discopop, sppo_hard, aot, sft)
}


def weighted_losses(scores: Scores, settings: DpoSettings) -> Tensor:
    """The weighted sum of the losses that a DPO recipe names."""
    return torch.stack([weight * LOSSES[name](scores, settings) for name, weight in settings.weighted_losses]).sum(0)


def shorter_first(counts: Tensor, alpha: float) -> Tensor:
    """The weight of each token, shape (N,): 1 up to the length of the pair's shorter answer, then ld_alpha. Liu et al.
    2024.
    Shapes: counts (2 P,)."""
    shared = counts.view(2, -1).amin(0).repeat(2).tolist()
    lengths = zip(counts.tolist(), shared, strict=True)
    return torch.cat([torch.where(torch.arange(count) < shorter, 1.0, alpha) for count, shorter in lengths])


def contrastive(scores: Scores, settings: CpoSettings) -> Tensor:
    """CPO loss of x = chosen score - rejected score. sigmoid: smoothed(beta x); hinge: max(0, 1 - beta x); ipo: (x - 1
    / (2 beta))^2, where scores are means over tokens. Xu et al. 2024."""
    beta, apart = settings.beta, scores.chosen - scores.rejected
    if settings.loss_type == "ipo":
        return (apart - 1 / (2 * beta)) ** 2
    if settings.loss_type == "hinge":
        return torch.relu(1 - beta * apart)
    return smoothed(beta * apart, settings.label_smoothing)


def simple(scores: Scores, settings: SimpoSettings) -> Tensor:
    """SimPO: -log s(beta (chosen - rejected) - gamma), where scores are means over tokens. Meng et al. 2024, eq. 6;
    in trl: the CPO trainer with loss_type simpo."""
    apart = settings.beta * (scores.chosen - scores.rejected) - settings.simpo_gamma
    return smoothed(apart, settings.label_smoothing)


def odds_ratio(scores: Scores, settings: OrpoSettings) -> Tensor:
    """ORPO: -beta log s(log odds(chosen) - log odds(rejected)), where odds = p / (1 - p), and log p is the mean over
    an answer's tokens. Hong et al. 2024, eq. 6 and 7."""
    return -settings.beta * logsigmoid(log_odds(scores.chosen) - log_odds(scores.rejected))


def log_odds(logp: Tensor) -> Tensor:
    """log p - log(1 - p). There are two equivalent formulas, for p below and above 1/2. p is at most 1 - eps, so that
    the result is finite."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.where(logp < -math.log(2), torch.log1p(-logp.exp()), (-torch.expm1(logp)).log())


def smoothed(logits: Tensor, share: float) -> Tensor:
    """-(1 - e) log s(x) - e log s(-x), the loss if a share e of the preferences is flipped."""
    return -logsigmoid(logits) * (1 - share) - logsigmoid(-logits) * share
