"""What objectives over pairs share: the scores of two answers to one prompt, and what is logged of them.

Comes in: preference pairs, then a Batch and the model's output.  Goes out: Scores, and Loss (sum over pairs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tunekit.contracts import Batch, Gather, ModelOutput, Sums, Window
from tunekit.machine.devices import summing_dtype
from tunekit.machine.placing import placed
from tunekit.objectives.answers import AnswerObjective, by_sequence
from tunekit.recipe.bases.pair_settings import REWARDS

SIDES = ("chosen", "rejected")
PREPARED = ("reference", "share", "matched")  # parts of a row that its step gives it


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the answers of P pairs, summed over their tokens (or their means), and the reference's, 0
    where there is none; `tokens`: how many each answer has. `likelihood`: what is added for the chosen answers' own
    sake. `matched`: of the reference's preferences, the one that each pair is compared with (aot). All (P,).
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    likelihood: Tensor
    matched: Tensor

    @property
    def chosen_ratio(self) -> Tensor:
        """(P,) log of policy over reference."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """(P,) log of policy over reference."""
        return self.rejected - self.reference_rejected

    @property
    def margin(self) -> Tensor:
        """(P,) by how much more than the reference the policy prefers the chosen answer."""
        return self.chosen_ratio - self.rejected_ratio


class PairObjective(AnswerObjective):
    """loss = sum over pairs of what a subclass makes of their Scores; divided by the step's number of pairs.

    Every score is of one pair; a mean over the step's tokens is prepared.
    """

    sides = SIDES
    unusable_key = "unusable_pairs"
    metrics: Sequence[str] = ("loss", *REWARDS)
    logged: Sequence[str] = REWARDS
    averages = False  # whether an answer's score is the mean over its tokens
    likelihood = 0.0  # weight of the mean loss of the chosen answers' tokens, their prompts' too if `prompts`

    def losses(self, scores: Scores) -> Tensor:
        """(P,) of each pair, without its likelihood."""
        raise NotImplementedError

    def prepare(self, model: Any, window: Window, gather: Gather = list) -> Window:
        """Also the weight of a token among all of the step."""
        window = super().prepare(model, window, gather)
        if not self.likelihood:
            return window
        tokens = sum(gather([int(self._likely(batch).sum()) for batch in window.batches]))
        share = sum(gather([len(batch.rows) for batch in window.batches])) / max(tokens, 1)
        return self.with_all(
            window, [{"share": np.full(len(batch.rows), share, np.float32)} for batch in window.batches]
        )

    def _likely(self, batch: Batch) -> Tensor:
        """How many tokens of each chosen answer (and of its prompt) are learnt for their own sake."""
        counts = batch.targets["counts"].view(-1, len(batch.rows))  # (2 or 3, P)
        return counts[[0, 2]] if self.prompts else counts[:1]

    def scores(self, output: ModelOutput, batch: Batch) -> Scores:
        """What the loss is made of."""
        found = self.log_probabilities(output, batch)  # (N,)
        both, counts = self.summed(found, batch).view(2, -1), batch.targets["counts"]
        tokens = placed(counts.float(), found.device).view(-1, both.shape[1])[:2]
        given = {name: placed(batch.targets[name], found.device) for name in PREPARED if name in batch.targets}
        reference = given["reference"].T if "reference" in given else torch.zeros_like(both)
        likelihood = torch.zeros_like(both[0])
        if self.likelihood:
            every = by_sequence(found, counts).view(-1, both.shape[1])  # (2 or 3, P)
            likelihood = -self.likelihood * given["share"] * (every[0] + (every[2] if self.prompts else 0.0))
        both = both / tokens if self.averages else both
        matched = given.get("matched", likelihood)
        return Scores(both[0], both[1], tokens[0], tokens[1], reference[0], reference[1], likelihood, matched)

    def compared(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Sums]:
        """(P,) loss of each pair, and sums over pairs of what is logged."""
        scores = self.scores(output, batch)
        logps = (scores.chosen.detach(), scores.rejected.detach())
        rewards = [self.beta * ratio.detach() for ratio in (scores.chosen_ratio, scores.rejected_ratio)]
        return self.losses(scores) + scores.likelihood, reward_sums(*rewards, *logps)


def reward_sums(chosen: Tensor, rejected: Tensor, *more: Tensor) -> Sums:
    """Sums over pairs of REWARDS: both rewards, by how much and how often the first is higher, then `more`."""
    found = (chosen, rejected, chosen - rejected, chosen > rejected, *more)
    return {name: values.sum(dtype=summing_dtype(values.device)) for name, values in zip(REWARDS, found, strict=False)}


def smoothed(logits: Tensor, share: float) -> Tensor:
    """-(1 - e) log s(x) - e log s(-x), where a share e of the preferences is flipped."""
    return -logsigmoid(logits) * (1 - share) - logsigmoid(-logits) * share
