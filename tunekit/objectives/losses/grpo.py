"""Group relative policy optimization: the model writes completions and learns to prefer those with higher rewards.

Source: Shao et al. 2024 (GRPO), Yu et al. 2025 (DAPO), Liu et al. 2025 (Dr. GRPO), MiniMax 2025 (CISPO), Zheng et al.
2025 (GSPO). Names and formulas are the same as in trl 1.16, with two differences. The loss is a mean over the whole
step on all ranks; trl's grpo and dr_grpo average over micro-batches. The model samples and scores without dropout.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunekit.contracts import Batch, Loss, ModelOutput, RunView, StepBatches, Sums
from tunekit.machine.placing import to_device
from tunekit.objectives.losses.advantages import (
    Rewards,
    by_token,
    clipping,
    mean,
    read_tokens,
    scaled,
    spread,
    summed,
    teaches_nothing,
)
from tunekit.objectives.losses.answers import by_sequence
from tunekit.objectives.losses.samples import SampledLoss, prompt_rows, token_counts
from tunekit.recipe.objectives.grpo import GrpoSettings


@dataclass(frozen=True)
class GroupRelative(SampledLoss):
    """loss = sum over completions of the weighted sum over tokens of -min(r A, clip(r, 1 - e, 1 + e') A) + beta KL.

    r is the ratio of the token's probability to its probability at sampling. A is the completion's advantage. KL (k3)
    is exp(d) - d - 1, where d is the reference's log-probability minus the policy's. With use_bias_correction_kl, KL is
    multiplied by r, which makes its gradient unbiased.
    """

    settings: GrpoSettings

    def advantages(self, local: Rewards, step: Rewards) -> Rewards:
        """(reward - mean of the group) / (s + 1e-4), where s is the standard deviation of the rewards in the group or
        in the step. With scale_rewards: none, the difference is not divided."""
        centred = local - mean(local, axis=1)[:, None]
        scale = self.settings.scale_rewards
        if scale == "none":
            return centred
        deviation = spread(local, axis=1)[:, None] if scale == "group" else spread(step)
        return scaled(centred, deviation)

    def equal_groups(self, step: Rewards) -> NDArray[np.bool_]:
        """Whether all advantages of each group are 0. If advantages are divided by the standard deviation of the step,
        the result has one value, for the whole step."""
        if self.settings.scale_rewards == "batch":
            return teaches_nothing(step)[None]
        return super().equal_groups(step)

    def token_weights(self, counts: Rewards, tokens: float) -> Rewards:
        """The weight of each token of a completion. loss_type grpo: 1 / the completion's number of tokens; dr_grpo: 1 /
        max_completion_length; dapo and cispo: 1 / the mean number of tokens of the step's completions."""
        if self.settings.loss_type == "grpo":
            return 1 / np.maximum(counts, 1.0)
        longest = float(self.settings.max_completion_length)
        return np.full_like(counts, 1 / (longest if self.settings.loss_type == "dr_grpo" else tokens))

    def compared(self, run: RunView, step: StepBatches) -> tuple[StepBatches, None]:
        """Add the reference's log-probability of each completion token to the step's rows."""
        scores = run.reference(step.batches, self.token_scores, token_counts)
        return prompt_rows(run).with_tokens(step, "reference", scores), None

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """The sum over completions, and the logged values. Shapes: output.hidden (B, T, D) -> total (1,)."""
        settings, tokens = self.settings, read_tokens(output, batch, self.settings.temperature)
        counts, share, prepared = tokens.counts, tokens.share, tokens.prepared
        by_completion = settings.importance_sampling_level == "sequence"
        log_ratio = tokens.log_ratio
        if by_completion:
            log_ratio = by_sequence(log_ratio, counts) / to_device(counts.clamp(min=1), log_ratio.device)  # (G P,)
        ratio = torch.exp(log_ratio)
        advantages = prepared["advantages"] if by_completion else by_token(prepared["advantages"], counts)
        losses = self._losses(ratio, advantages, tokens.logps, counts)
        losses = by_token(losses, counts) if len(losses) != len(tokens.logps) else losses
        metrics: Sums = {}
        if settings.beta:
            apart = prepared["reference"] - tokens.logps  # (N,)
            kl = torch.exp(apart) - apart - 1
            if settings.use_bias_correction_kl:
                kl = kl * (by_token(ratio, counts) if by_completion else ratio)
            losses = losses + settings.beta * kl
            metrics["kl"] = summed(kl * share)
        total = (losses * by_token(prepared["weights"], counts)).sum()
        metrics["entropy"] = summed(tokens.entropies * share)
        return Loss(total[None], metrics=metrics | self._clipped(ratio, advantages, None if by_completion else share))

    def _losses(self, ratio: Tensor, advantages: Tensor, logps: Tensor, counts: Tensor) -> Tensor:
        """The loss of each token (N,); or of each completion (G P,) if each completion has a single ratio."""
        settings = self.settings
        if settings.loss_type == "cispo":
            capped = torch.clamp(ratio, max=settings.clip_high).detach() * advantages
            return -(by_token(capped, counts) if len(capped) != len(logps) else capped) * logps
        clipped = torch.clamp(ratio, 1 - settings.epsilon, 1 + settings.clip_high)
        return -torch.min(ratio * advantages, clipped * advantages)

    def _clipped(self, ratio: Tensor, advantages: Tensor, share: Tensor | None) -> Sums:
        """The number of clipped ratios. A token's ratio counts with the weight `share`; a completion's ratio (`share`
        None) counts as 1."""
        settings = self.settings
        if settings.loss_type == "cispo":
            marks = {"cispo_clip_ratio": (ratio > settings.clip_high) & (advantages > 0)}
        else:
            marks = clipping(ratio, advantages, settings.epsilon, settings.clip_high)
        return {name: summed(clipped * (1.0 if share is None else share)) for name, clipped in marks.items()}
