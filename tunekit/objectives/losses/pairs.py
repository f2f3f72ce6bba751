"""The loss of preference pairs. Its formula is a function of the scores of two answers to one prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tunekit.contracts import Array, Batch, ModelOutput, Rows, RunView, StepBatches, Sums
from tunekit.machine.devices import summing_dtype
from tunekit.machine.placing import to_device
from tunekit.objectives.losses.answers import AnswerLoss, by_row, by_sequence, predicted, reference_scores
from tunekit.recipe.bases.pair_settings import REWARDS

PREPARED = ("reference", "share", "matched")  # parts that `prepare_step` adds to a row


@dataclass(frozen=True)
class Scores:
    """The scores of P pairs, each of shape (P,). An answer's score is the sum or mean of its tokens' log-probabilities.
    Without a reference model, the reference's scores are 0. `likelihood`: the supervised loss of the chosen answer.
    `matched`: the reference's preference that loss aot compares with the policy's preference."""

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
        """The log-ratio of policy to reference for the chosen answer, shape (P,)."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """The log-ratio of policy to reference for the rejected answer, shape (P,)."""
        return self.rejected - self.reference_rejected

    @property
    def margin(self) -> Tensor:
        """The log-ratio of the chosen answer minus the log-ratio of the rejected answer, shape (P,)."""
        return self.chosen_ratio - self.rejected_ratio


@dataclass(frozen=True)
class PairLoss(AnswerLoss):
    """loss = sum over pairs of formula(Scores) + likelihood; divided by the step's number of pairs.

    `averages`: whether an answer's score is the mean over its tokens, instead of the sum.
    `likelihood`: the weight of the mean loss of the step's chosen answers; `prompts`: the mean includes prompt tokens.
    `token_weights`: a function counts (S P,) -> (N,) that returns each token's weight in the scores; None: 1 each.
    `matches`: the policy's preferences are compared with the reference's preferences of equal rank (loss aot).
    `keeps`: whether the reference's scores of each row are cached; auto: as in `reference_scores`.

    An evaluation sets `share` (pairs per token of `likelihood`) and `matched` (by row number) once for all its rows. If
    they are None, `prepare_step` computes them for each step.
    """

    formula: Callable[[Scores], Tensor]
    beta: float
    averages: bool = False
    likelihood: float = 0.0
    prompts: bool = False
    token_weights: Callable[[Tensor], Tensor] | None = None
    reference: bool = False
    matches: bool = False
    keeps: str | bool = False
    metrics: Sequence[str] = ("loss", *REWARDS)
    logged: Sequence[str] = REWARDS
    share: float | None = None
    matched: Mapping[int, float] | None = None

    def measuring(self, run: RunView, rows: Rows, batches: Iterable[Batch]) -> PairLoss:
        """A copy of the loss whose `share` and `matched` are computed from all evaluation rows, so that they do not
        depend on the division into batches."""
        if not (self.likelihood or self.matches):
            return self
        counts, preferences = list[tuple[int, int]](), list[tuple[int, float, float]]()
        for batch in batches:
            counts.append(self._counted(batch))
            if self.matches:
                policy = run.score([batch], self.answer_scores)[0]
                reference = reference_scores(run, [batch], self.answer_scores, keeps=self.keeps)[0]
                numbers = [row.number for row in batch.rows]
                preferences += zip(numbers, *(preference(each).tolist() for each in (policy, reference)), strict=True)
        share, preferences = _share(run.gather(counts)), sorted(run.gather(preferences))
        if not self.matches:
            return replace(self, share=share)
        places, ours, theirs = zip(*preferences, strict=True)
        of_rank = same_rank(np.array(ours, np.float32), ours, theirs).tolist()
        return replace(self, share=share, matched=dict(zip(places, of_rank, strict=True)))

    def prepare_step(self, run: RunView, step: StepBatches, earlier: StepBatches | None) -> StepBatches:
        """Add up to three values to each row of the step: the reference's scores, the weight of each token in
        `likelihood`, and the matched preference."""
        if self.reference:
            scores = reference_scores(run, step.batches, self.answer_scores, keeps=self.keeps)
            step = run.rows.with_parts(step, [{"reference": by_row(both, 2)} for both in scores])
        if self.likelihood:
            share = self.share
            if share is None:
                share = _share(run.gather([self._counted(batch) for batch in step.batches]))
            parts = [{"share": np.full(len(batch.rows), share, np.float32)} for batch in step.batches]
            step = run.rows.with_parts(step, parts)
        return self._with_matches(run, step) if self.matches else step

    def _counted(self, batch: Batch) -> tuple[int, int]:
        """The number of tokens in the chosen answers (with `prompts`, also in their prompts), and the number of
        pairs."""
        counts = batch.targets["counts"].view(-1, len(batch.rows))  # (2 or 3, P)
        return int((counts[[0, 2]] if self.prompts else counts[:1]).sum()), len(batch.rows)

    def _with_matches(self, run: RunView, step: StepBatches) -> StepBatches:
        """For each row of the step, find the rank of its preference among the policy's preferences. Add the reference's
        preference of the same rank to the row."""
        if self.matched is None:
            preferences = [preference(scores) for scores in run.score(step.batches, self.answer_scores)]
            local = np.concatenate([np.empty(0, np.float32), *preferences])  # (pairs,) of this rank; it may have none
            theirs = [float(np.subtract(*row.parts["reference"])) for batch in step.batches for row in batch.rows]
            matched = iter(same_rank(local, run.gather(local.tolist()), run.gather(theirs)))
        else:
            matched = iter([np.float32(self.matched[row.number]) for batch in step.batches for row in batch.rows])
        parts = [np.array([next(matched) for _ in batch.rows]) for batch in step.batches]
        return run.rows.with_parts(step, [{"matched": part} for part in parts])

    def answer_scores(self, output: ModelOutput, batch: Batch) -> Tensor:
        """The scores of all chosen answers, then the scores of all rejected answers, shape (2 P,)."""
        return self._summed(predicted(output, batch), batch)

    def _summed(self, logps: Tensor, batch: Batch) -> Tensor:
        """The scores of the answers, from their tokens' log-probabilities. Shapes: logps (N,) -> (2 P,)."""
        counts = batch.targets["counts"][: 2 * len(batch.rows)]
        logps = logps[: int(counts.sum())]
        weighted = logps if self.token_weights is None else logps * to_device(self.token_weights(counts), logps.device)
        return by_sequence(weighted, counts)

    def scores(self, output: ModelOutput, batch: Batch) -> Scores:
        """The scores that the formula reads."""
        logps = predicted(output, batch)  # (N,)
        both, counts = self._summed(logps, batch).view(2, -1), batch.targets["counts"]
        tokens = to_device(counts.float(), logps.device).view(-1, both.shape[1])[:2]
        prepared = {name: to_device(batch.targets[name], logps.device) for name in PREPARED if name in batch.targets}
        reference = prepared["reference"].T if "reference" in prepared else torch.zeros_like(both)
        likelihood = torch.zeros_like(both[0])
        if self.likelihood:
            sums = by_sequence(logps, counts).view(-1, both.shape[1])  # (2 or 3, P)
            likelihood = -self.likelihood * prepared["share"] * (sums[0] + (sums[2] if self.prompts else 0.0))
        both = both / tokens if self.averages else both
        matched = prepared.get("matched", likelihood)
        return Scores(both[0], both[1], tokens[0], tokens[1], reference[0], reference[1], likelihood, matched)

    def compared(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Sums]:
        """The loss of each pair, shape (P,), and the logged metrics, summed over pairs."""
        scores = self.scores(output, batch)
        logps = (scores.chosen.detach(), scores.rejected.detach())
        rewards = [self.beta * ratio.detach() for ratio in (scores.chosen_ratio, scores.rejected_ratio)]
        return self.formula(scores) + scores.likelihood, reward_sums(*rewards, *logps)


def preference(scores: Tensor) -> Array:
    """The score of each chosen answer minus the score of the rejected answer. Shapes: (2 P,) -> (P,)."""
    return np.subtract(*scores.numpy().reshape(2, -1))


def same_rank(local: Array, policy: Sequence[float], reference: Sequence[float]) -> Array:
    """For each value of `local`: find its rank among the values of `policy`, and return the value of `reference` at
    this rank. The lists need not be sorted. Shape: (P,)."""
    order, ranks = np.argsort(local, kind="stable"), np.empty(len(local), np.int64)
    equals = np.arange(len(local)) - np.searchsorted(local[order], local[order])  # number of earlier equal values
    ranks[order] = np.searchsorted(np.sort(policy), local[order]) + equals
    return np.sort(reference).astype(np.float32)[ranks]


def _share(counts: Sequence[tuple[int, int]]) -> float:
    """The number of pairs per token."""
    return sum(pairs for _, pairs in counts) / max(sum(tokens for tokens, _ in counts), 1)


def reward_sums(chosen: Tensor, rejected: Tensor, *more: Tensor) -> Sums:
    """Sums over pairs, named by REWARDS: the chosen reward, the rejected reward, their difference, and the number of
    pairs whose chosen reward is higher. The sums of `more` follow."""
    columns = zip(REWARDS, (chosen, rejected, chosen - rejected, chosen > rejected, *more), strict=False)
    return {name: values.sum(dtype=summing_dtype(values.device)) for name, values in columns}
