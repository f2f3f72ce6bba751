"""REINFORCE leave-one-out (RLOO): a completion's advantage is its reward minus the mean reward of the other completions
of the same prompt.

Source: Ahmadian et al. 2024. Names and formulas are the same as in trl 1.16: the KL is summed over a completion's
tokens and subtracted from its reward, and each completion has a single ratio.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tunekit.contracts import Batch, Loss, ModelOutput, RunView, StepBatches
from tunekit.objectives.losses.advantages import Rewards, clipping, mean, read_tokens, scaled, spread, summed
from tunekit.objectives.losses.answers import by_row, by_sequence
from tunekit.objectives.losses.samples import SampledLoss, prompt_rows, token_counts
from tunekit.recipe.objectives.rloo import RlooSettings


@dataclass(frozen=True)
class LeaveOneOut(SampledLoss):
    """loss = sum over completions of -min(r A, clip(r, 1 - e, 1 + e') A). r is the ratio of the completion's
    probability to its probability at sampling, and A is the completion's advantage."""

    settings: RlooSettings

    def advantages(self, local: Rewards, step: Rewards) -> Rewards:
        """Each reward minus the mean of the other rewards in its group. With normalize_advantages, the results are
        scaled to mean 0 and standard deviation 1 over the step."""
        plain = _less_the_others(local)
        if not self.settings.normalize_advantages:
            return plain
        of_step = _less_the_others(step)
        return scaled(plain - mean(of_step), spread(of_step))

    def compared(self, run: RunView, step: StepBatches) -> tuple[StepBatches, Sequence[Rewards]]:
        """Add the KL of each token to the step's rows. Also return beta times the KL of each completion, as a penalty
        on its reward. The KL (k1) is the policy's log-probability minus the reference's."""
        rows, what = prompt_rows(run), (step.batches, self.token_scores, token_counts)
        policy, reference = run.score(*what), run.reference(*what)
        apart = [ours.float() - theirs.float() for ours, theirs in zip(policy, reference, strict=True)]  # (N,) each
        pairs, sides = zip(apart, step.batches, strict=True), len(rows.answers.sides)
        kl = [by_row(by_sequence(tokens, batch.targets["counts"]), sides).astype(np.float64) for tokens, batch in pairs]
        return rows.with_tokens(step, "kl", apart), [self.settings.beta * penalty for penalty in kl]

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """The sum over completions, and the logged values. Shapes: output.hidden (B, T, D) -> total (1,)."""
        settings, tokens = self.settings, read_tokens(output, batch, self.settings.temperature)
        ratio, advantages = torch.exp(by_sequence(tokens.log_ratio, tokens.counts)), tokens.prepared["advantages"]
        clipped = torch.clamp(ratio, 1 - settings.epsilon, 1 + settings.clip_high)
        losses: Tensor = -torch.min(ratio * advantages, clipped * advantages)  # (G P,)
        metrics = {"entropy": summed(tokens.entropies * tokens.share)}
        if "kl" in tokens.prepared:
            metrics["kl"] = summed(tokens.prepared["kl"] * tokens.share)
        marks = clipping(ratio, advantages, settings.epsilon, settings.clip_high)
        metrics |= {name: summed(values.float()) for name, values in marks.items()}
        return Loss(losses.sum()[None], metrics=metrics)


def _less_the_others(rewards: Rewards) -> Rewards:
    """Each reward minus the mean of the other rewards in its group. A NaN is left out of the mean; if there are no
    other rewards, the result is NaN.
    Shapes: (P, G) -> (P, G)."""
    count = np.sum(~np.isnan(rewards), axis=1, keepdims=True) - 1  # (P, 1)
    others = (np.nansum(rewards, axis=1, keepdims=True) - rewards) / np.where(count > 0, count, np.nan)
    return rewards - others
