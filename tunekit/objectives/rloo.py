"""REINFORCE leave-one-out: a completion's advantage is its reward less the mean reward of the others to its prompt.

Comes in: rows of prompts, then windows of their completions and the model's output.  Goes out: Loss (sum over
completions).  Source: Ahmadian et al. 2024; names and formulas are those of trl 1.16: the KL, summed over the tokens of
a completion, is taken off its reward, and the ratio is that of the whole completion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunekit.contracts import Batch, Loss, ModelOutput, Tokenizer, Window
from tunekit.objectives.answers import by_sequence
from tunekit.objectives.rewards import Scores
from tunekit.objectives.samples import SampleObjective
from tunekit.objectives.worth import CLIPPED, LEAST_SPREAD, by_token, clipped_ratios, mean, spread, summed
from tunekit.recipe.objectives.rloo import RlooSettings


class Rloo(SampleObjective):
    """loss = sum over completions of -min(r A, clip(r, 1 - e, 1 + e') A), r the probability of the completion over that
    at sampling, A its advantage."""

    settings: RlooSettings

    def __init__(self, settings: RlooSettings, tokenizer: Tokenizer) -> None:
        super().__init__(settings, tokenizer)
        self.logged = (*(("kl",) if settings.beta else ()), "entropy", *CLIPPED)

    def advantages(self, own: Scores, every: Scores) -> Scores:
        """r less the mean of the others in its group; over the step to mean 0 and deviation 1 where that is asked."""
        found = _less_the_others(own)
        if not self.settings.normalize_advantages:
            return found
        step = _less_the_others(every)
        advantages: Scores = (found - mean(step)) / (spread(step) + LEAST_SPREAD)
        return advantages

    def token_weights(self, counts: Scores, tokens: float) -> Scores:
        """The loss is of completions."""
        return np.ones_like(counts)

    def penalised(self, model: Any, window: Window) -> tuple[Window, Sequence[Scores] | None]:
        """beta times the KL of each completion, k1: the policy's log-probability less the reference's, is taken off."""
        if not self.settings.beta:
            return window, None
        old = model.scored(window.batches, self.of_tokens)
        reference = model.scored(window.batches, self.of_tokens, bypassed=True)
        apart = [ours.float() - theirs.float() for ours, theirs in zip(old, reference, strict=True)]  # (N,) each
        pairs = zip(apart, window.batches, strict=True)
        penalties = [self.by_row(by_sequence(kl, batch.targets["counts"])).astype(np.float64) for kl, batch in pairs]
        return self.with_tokens(window, "kl", apart), [self.settings.beta * each for each in penalties]

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """Shapes: output.hidden (B, T, D) -> total (1,)."""
        assert output.hidden is not None
        device, counts = output.hidden.device, batch.targets["counts"]
        given = self.given(batch, device)
        entropies = torch.zeros(int(counts.sum()), dtype=torch.float32, device=device)  # (N,)
        found = self.log_probabilities(output, batch, entropies)  # (N,)
        ratio = torch.exp(by_sequence(found - given.get("old", found.detach()), counts))  # (G P,)
        advantages, settings = given["advantages"], self.settings
        clipped = torch.clamp(ratio, 1 - settings.epsilon, 1 + settings.clip_high)
        losses: Tensor = -torch.min(ratio * advantages, clipped * advantages)
        share = by_token(given["share"][:, 0].repeat(len(self.sides)), counts)  # (N,)
        metrics = {"entropy": summed(entropies * share)}
        if "kl" in given:
            metrics["kl"] = summed(given["kl"] * share)
        marks = clipped_ratios(ratio, advantages, settings.epsilon, settings.clip_high)
        metrics |= {name: summed(each.float()) for name, each in marks.items()}
        return Loss(losses.sum()[None], metrics=metrics)


def _less_the_others(rewards: Scores) -> Scores:
    """Each less the mean of the others that can be judged; NaN where there is none. Shapes: (P, G) -> (P, G)."""
    count = np.sum(~np.isnan(rewards), axis=1, keepdims=True) - 1  # (P, 1)
    others = (np.nansum(rewards, axis=1, keepdims=True) - rewards) / np.where(count > 0, count, np.nan)
    found: Scores = rewards - others
    return found


def make(settings: RlooSettings, processor: Tokenizer, facts: Mapping[str, Any]) -> Rloo:
    """The objective of `objective: rloo`."""
    return Rloo(settings, processor)
