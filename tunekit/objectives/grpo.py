"""Group relative policy optimization: of its own completions to a prompt, the model learns those of higher reward.

Comes in: rows of prompts, then windows of their completions and the model's output.  Goes out: Loss (sum over
completions).  Source: Shao et al. 2024 (GRPO), Yu et al. 2025 (DAPO), Liu et al. 2025 (Dr. GRPO), MiniMax 2025 (CISPO),
Zheng et al. 2025 (GSPO); names and formulas are those of trl 1.16.  What differs by design: a batch is the whole step,
on all ranks, where trl's grpo and dr_grpo average over micro-batches; the model samples and scores without dropout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunekit.contracts import Batch, Loss, ModelOutput, Sums, Tokenizer
from tunekit.machine.placing import placed
from tunekit.objectives.answers import by_sequence
from tunekit.objectives.rewards import Scores
from tunekit.objectives.samples import SampleObjective
from tunekit.objectives.worth import CLIPPED, LEAST_SPREAD, by_token, clipped_ratios, mean, spread, summed
from tunekit.recipe.objectives.grpo import GrpoSettings


class Grpo(SampleObjective):
    """loss = sum over completions of the weighted sum over tokens of -min(r A, clip(r, 1 - e, 1 + e') A) + beta KL.

    r is the probability of the token over that at sampling, A the completion's advantage, KL = exp(d) - d - 1 with d
    the reference's log-probability less the policy's (k3), times r where its gradient is to be unbiased.
    """

    settings: GrpoSettings

    def __init__(self, settings: GrpoSettings, tokenizer: Tokenizer) -> None:
        super().__init__(settings, tokenizer)
        kl = ("kl",) if settings.beta else ()
        clipped = ("cispo_clip_ratio",) if settings.loss_type == "cispo" else CLIPPED
        self.logged = (*kl, "entropy", *clipped)

    def advantages(self, own: Scores, every: Scores) -> Scores:
        """(r - mean of the group) / (s + 1e-4), s the standard deviation of the group, or of the step; or 1."""
        centred = own - mean(own, axis=1)[:, None]
        scale = self.settings.scale_rewards
        if scale == "none":
            return centred
        found = spread(own, axis=1)[:, None] if scale == "group" else spread(every)
        advantages: Scores = centred / (found + LEAST_SPREAD)
        return advantages

    def zero_spread(self, every: Scores) -> Any:
        """Of the groups; of the step where advantages are divided by its standard deviation."""
        if self.settings.scale_rewards == "batch":
            return np.isclose(spread(every), 0.0)[None]
        return super().zero_spread(every)

    def token_weights(self, counts: Scores, tokens: float) -> Scores:
        """grpo: 1 / tokens of the completion; dr_grpo: 1 / max_completion_length; dapo, cispo: 1 / those of the average
        completion of the step."""
        if self.settings.loss_type == "grpo":
            return 1 / np.maximum(counts, 1.0)
        longest = float(self.settings.max_completion_length)
        return np.full_like(counts, 1 / (longest if self.settings.loss_type == "dr_grpo" else tokens))

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """Shapes: output.hidden (B, T, D) -> total (1,)."""
        assert output.hidden is not None
        settings, device, counts = self.settings, output.hidden.device, batch.targets["counts"]
        given = self.given(batch, device)
        entropies = torch.zeros(int(counts.sum()), dtype=torch.float32, device=device)  # (N,)
        found = self.log_probabilities(output, batch, entropies)  # (N,)
        log_ratio = found - given.get("old", found.detach())  # (N,)
        by_completion = settings.importance_sampling_level == "sequence"
        if by_completion:
            log_ratio = by_sequence(log_ratio, counts) / placed(counts.clamp(min=1), device)  # (G P,)
        ratio = torch.exp(log_ratio)
        advantages = given["advantages"] if by_completion else by_token(given["advantages"], counts)
        losses = self._losses(ratio, advantages, found, counts)
        losses = by_token(losses, counts) if len(losses) != len(found) else losses
        metrics: Sums = {}
        share = by_token(given["share"][:, 0].repeat(len(self.sides)), counts)  # (N,)
        if settings.beta:
            apart = given["reference"] - found  # (N,)
            kl = torch.exp(apart) - apart - 1
            if settings.use_bias_correction_kl:
                kl = kl * (by_token(ratio, counts) if by_completion else ratio)
            losses = losses + settings.beta * kl
            metrics["kl"] = summed(kl * share)
        total = (losses * by_token(given["weights"], counts)).sum()
        metrics["entropy"] = summed(entropies * share)
        return Loss(total[None], metrics=metrics | self._clipped(ratio, advantages, None if by_completion else share))

    def _losses(self, ratio: Tensor, advantages: Tensor, found: Tensor, counts: Tensor) -> Tensor:
        """(N,), or (G P,) where there is one ratio for each completion."""
        settings = self.settings
        if settings.loss_type == "cispo":
            capped = torch.clamp(ratio, max=settings.clip_high).detach() * advantages
            return -(by_token(capped, counts) if len(capped) != len(found) else capped) * found
        clipped = torch.clamp(ratio, 1 - settings.epsilon, 1 + settings.clip_high)
        return -torch.min(ratio * advantages, clipped * advantages)

    def _clipped(self, ratio: Tensor, advantages: Tensor, share: Tensor | None) -> Sums:
        """How many ratios are clipped: of tokens, which count `share` each, or of completions."""
        settings = self.settings
        if settings.loss_type == "cispo":
            found = {"cispo_clip_ratio": (ratio > settings.clip_high) & (advantages > 0)}
        else:
            found = clipped_ratios(ratio, advantages, settings.epsilon, settings.clip_high)
        return {name: summed(marks * (1.0 if share is None else share)) for name, marks in found.items()}


def make(settings: GrpoSettings, processor: Tokenizer, facts: Mapping[str, Any]) -> Grpo:
    """The objective of `objective: grpo`."""
    return Grpo(settings, processor)
