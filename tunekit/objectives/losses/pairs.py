"""The loss of preference pairs: any formula over the scores of two answers to one prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tunekit.contracts import Batch, ModelOutput, RunView, Sums, Window
from tunekit.machine.devices import summing_dtype
from tunekit.machine.placing import placed
from tunekit.objectives.losses.answers import AnswerLoss, by_row, by_sequence, predicted, reference_scores
from tunekit.recipe.bases.pair_settings import REWARDS

PREPARED = ("reference", "share", "matched")  # parts of a row that its step adds


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the answers of P pairs, summed over their tokens (or their means), and the reference's, 0
    if there is none; `tokens`: how many each answer has. `likelihood`: a loss of the chosen answer alone. `matched`:
    the reference's preference that each pair is compared with (aot). All (P,).
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


@dataclass(frozen=True)
class PairLoss(AnswerLoss):
    """loss = sum over pairs of formula(Scores) + likelihood; divided by the step's number of pairs.

    `averages`: an answer's score is the mean over its tokens.  `likelihood`: weight of the mean loss of the step's
    chosen tokens; `prompts`: with those of their prompts.  `token_weights`: counts (S P,) -> (N,) weights of tokens in
    the scores; None: 1 each.  `matches`: each pair is compared with the reference's preference of its rank in the step
    (aot).  `keeps`: the reference scores each row once.
    """

    formula: Callable[[Scores], Tensor]
    beta: float
    averages: bool = False
    likelihood: float = 0.0
    prompts: bool = False
    token_weights: Callable[[Tensor], Tensor] | None = None
    reference: bool = False
    matches: bool = False
    keeps: bool = False
    metrics: Sequence[str] = ("loss", *REWARDS)
    logged: Sequence[str] = REWARDS

    def prepare(self, run: RunView, window: Window) -> Window:
        """Each row with the reference's scores, the weight of a token among all of the step, and its match."""
        if self.reference:
            scores = reference_scores(run, window.batches, self.answer_scores, keeps=self.keeps)
            window = run.rows.with_parts(window, [{"reference": by_row(both, 2)} for both in scores])
        if self.likelihood:
            tokens = sum(run.gather([int(self._likely(batch).sum()) for batch in window.batches]))
            share = sum(run.gather([len(batch.rows) for batch in window.batches])) / max(tokens, 1)
            parts = [{"share": np.full(len(batch.rows), share, np.float32)} for batch in window.batches]
            window = run.rows.with_parts(window, parts)
        return self._matched(run, window) if self.matches else window

    def _likely(self, batch: Batch) -> Tensor:
        """The number of tokens of each chosen answer (and of its prompt) that `likelihood` counts."""
        counts = batch.targets["counts"].view(-1, len(batch.rows))  # (2 or 3, P)
        return counts[[0, 2]] if self.prompts else counts[:1]

    def _matched(self, run: RunView, window: Window) -> Window:
        """Each row with the reference's preference that has the rank of the row's own preference in the step."""
        scores = run.score(window.batches, self.answer_scores)
        preferences = [np.subtract(*both.numpy().reshape(2, -1)) for both in scores]
        local = np.concatenate([np.empty(0, np.float32), *preferences])  # (pairs,) of this rank, which may have none
        theirs = [float(np.subtract(*row.parts["reference"])) for batch in window.batches for row in batch.rows]
        policy, reference = np.sort(run.gather(local.tolist())), np.sort(run.gather(theirs)).astype(np.float32)
        order, ranks = np.argsort(local, kind="stable"), np.empty(len(local), np.int64)
        equals = np.arange(len(local)) - np.searchsorted(local[order], local[order])  # equal ones before it
        ranks[order] = np.searchsorted(policy, local[order]) + equals
        matched = iter(reference[ranks])
        parts = [np.array([next(matched) for _ in batch.rows]) for batch in window.batches]
        return run.rows.with_parts(window, [{"matched": part} for part in parts])

    def answer_scores(self, output: ModelOutput, batch: Batch) -> Tensor:
        """(2 P,) score of each chosen answer, then of each rejected one."""
        return self._summed(predicted(output, batch), batch)

    def _summed(self, logps: Tensor, batch: Batch) -> Tensor:
        """Shapes: logps (N,) -> (2 P,)."""
        counts = batch.targets["counts"][: 2 * len(batch.rows)]
        logps = logps[: int(counts.sum())]
        weighted = logps if self.token_weights is None else logps * placed(self.token_weights(counts), logps.device)
        return by_sequence(weighted, counts)

    def scores(self, output: ModelOutput, batch: Batch) -> Scores:
        """All that the formula reads."""
        logps = predicted(output, batch)  # (N,)
        both, counts = self._summed(logps, batch).view(2, -1), batch.targets["counts"]
        tokens = placed(counts.float(), logps.device).view(-1, both.shape[1])[:2]
        prepared = {name: placed(batch.targets[name], logps.device) for name in PREPARED if name in batch.targets}
        reference = prepared["reference"].T if "reference" in prepared else torch.zeros_like(both)
        likelihood = torch.zeros_like(both[0])
        if self.likelihood:
            sums = by_sequence(logps, counts).view(-1, both.shape[1])  # (2 or 3, P)
            likelihood = -self.likelihood * prepared["share"] * (sums[0] + (sums[2] if self.prompts else 0.0))
        both = both / tokens if self.averages else both
        matched = prepared.get("matched", likelihood)
        return Scores(both[0], both[1], tokens[0], tokens[1], reference[0], reference[1], likelihood, matched)

    def compared(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Sums]:
        """(P,) loss of each pair, and sums over pairs of what is logged."""
        scores = self.scores(output, batch)
        logps = (scores.chosen.detach(), scores.rejected.detach())
        rewards = [self.beta * ratio.detach() for ratio in (scores.chosen_ratio, scores.rejected_ratio)]
        return self.formula(scores) + scores.likelihood, reward_sums(*rewards, *logps)


def reward_sums(chosen: Tensor, rejected: Tensor, *more: Tensor) -> Sums:
    """Sums over pairs of REWARDS: both rewards, by how much and how often the first is higher, then `more`."""
    columns = zip(REWARDS, (chosen, rejected, chosen - rejected, chosen > rejected, *more), strict=False)
    return {name: values.sum(dtype=summing_dtype(values.device)) for name, values in columns}
