"""Kahneman-Tversky optimization: tuning on single answers marked as good or bad. The reference is the model at step 0.

Source: Ethayarajh et al. 2024, eq. 7. Names and formulas are the same as in trl 1.16, with three differences:

- One KL is estimated for the whole step on all ranks, or for all rows of an evaluation. trl estimates one KL for each
  micro-batch.
- A mismatched row combines a prompt with the answer of the nearest earlier row of the files that has a different
  prompt. In trl, it is the previous row of the batch. In a step of one row, the KL is 0.
- The policy's KL is computed without dropout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from tunekit.contracts import Array, Batch, ModelOutput, Row, Rows, RunView, StepBatches, Sums
from tunekit.machine.devices import for_sums
from tunekit.machine.placing import to_device
from tunekit.objectives.losses.answers import AnswerLoss, by_row, by_sequence, predicted, reference_scores
from tunekit.recipe.objectives.kto import LOGGED, KtoSettings

MOST_RATIO = 4 / 3  # the maximum ratio of the weighted numbers of good and bad rows; eq. 8
SIDE = "completion"
IdsAndMarks = tuple[Array, Array]  # (T,) ids and marks


@dataclass(frozen=True)
class KtoLoss(AnswerLoss):
    """loss = sum over rows of w s(beta (kl - r)) for a good answer, or w s(beta (r - kl)) for a bad answer.

    s is the logistic function, r the log-ratio of policy to reference, w the weight of good or bad answers. With
    apo_zero_unpaired, kl is 0.
    `balance`: the result of `_balance` for all evaluation rows; None: `prepare_step` computes it for each step.
    `lengths`: the lengths of all prompts and the lengths of all answers, in descending order. A simulated step makes
    mismatched rows of these lengths.
    """

    settings: KtoSettings
    balance: tuple[float, ...] | None = None
    lengths: tuple[Array, Array] | None = field(default=None, compare=False)
    reference: bool = True
    metrics: Sequence[str] = ("loss", *LOGGED)
    logged: Sequence[str] = LOGGED
    without_reference = "pairs of answers with an objective that needs no reference model, such as orpo or simpo"

    def measuring(self, run: RunView, rows: Rows, batches: Iterable[Batch]) -> KtoLoss:
        """A copy of the loss with one KL for all evaluation rows, so that metrics do not depend on the division into
        batches."""

        estimated = self.settings.loss_type == "kto" and len(rows) > 1
        others = _others([_prompt(rows[index]) for index in range(len(rows))]) if estimated else []

        def other(row: Row) -> IdsAndMarks:
            return _answer(rows[others[row.number]])

        apart, labels = list[float](), list[bool]()
        for batch in batches:
            labels += _labels(batch)
            if estimated:
                mismatched = [_mismatched(run, batch, other)]
                policy, reference = run.score(mismatched, answer_scores)[0], run.reference(mismatched, answer_scores)[0]
                apart += (policy - reference).tolist()
        return replace(self, balance=_balance(run.gather(apart), run.gather(labels)))

    def prepare_step(self, run: RunView, step: StepBatches, earlier: StepBatches | None) -> StepBatches:
        """Add three values to each row of the step: its reference score, the step's KL, and the two factors of
        `_balance`. The factors turn a mean over all rows into a mean over the good rows, or over the bad rows."""
        estimated = self.settings.loss_type == "kto" and self.balance is None
        mismatched = self._mismatched_window(run, step) if estimated else []
        keeps, count = self.settings.precompute_ref_log_probs, len(step.batches)
        reference = reference_scores(run, step.batches, answer_scores, keeps=keeps, further=mismatched)
        policy = run.score(mismatched, answer_scores) if mismatched else []
        pairs = zip(policy, reference[count:], strict=True)
        apart = [value for ours, theirs in pairs for value in (ours - theirs).tolist()]
        labels = [label for batch in step.batches for label in _labels(batch)]
        facts = np.array(self.balance or _balance(run.gather(apart), run.gather(labels)), np.float32)  # (3,)
        parts = [
            {"reference": by_row(scores, 1), "facts": np.tile(facts, (len(scores), 1))} for scores in reference[:count]
        ]
        return run.rows.with_parts(step, parts)

    def _mismatched_window(self, run: RunView, step: StepBatches) -> list[Batch]:
        """The step's batches with exchanged answers: each row gets the answer of the nearest row before it, by row
        number, with a different prompt, among the step's rows on all ranks. Empty if the step has only one row."""
        if run.is_simulated and self.lengths is not None:
            return [_longest(run, batch, self.lengths) for batch in step.batches]
        local = [(row.number, _prompt(row), _answer(row)) for batch in step.batches for row in batch.rows]
        numbers, prompts, answers = zip(*sorted(run.gather(local), key=lambda entry: entry[0]), strict=True)
        if len(set(numbers)) == 1:
            return []
        others = {number: answers[other] for number, other in zip(numbers, _others(prompts), strict=True)}
        return [_mismatched(run, batch, lambda row: others[row.number]) for batch in step.batches]

    def compared(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Sums]:
        """The loss of each row, shape (P,), and the logged metrics, summed over rows."""
        scores = answer_scores(output, batch)  # (P,)
        targets = {name: to_device(batch.targets[name], scores.device) for name in ("reference", "label", "facts")}
        good, (kl, *balance), beta = targets["label"][:, 0], targets["facts"].T, self.settings.beta
        ratio = scores - targets["reference"][:, 0]
        sign = torch.where(good, 1.0, -1.0)
        weight = torch.where(good, self.settings.desirable_weight, self.settings.undesirable_weight)
        losses = weight * (sign * beta * (kl - ratio)).sigmoid()
        sides = [for_sums(side) * share for side, share in zip((good, ~good), balance, strict=True)]  # (P,), mean 1
        reward, logps = beta * for_sums(ratio.detach()), for_sums(scores.detach())
        rewards = [reward * side for side in sides]
        columns = (*rewards, rewards[0] - rewards[1], *(logps * side for side in sides), for_sums(kl))
        return losses, {name: values.sum() for name, values in zip(LOGGED, columns, strict=True)}

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """The sums over all answers, and the number of good and of bad answers. Means over good or bad answers are
        divided by these numbers."""
        good, facts = batch.targets["label"][:, 0], batch.targets["facts"].double()
        counts = {"chosen_units": (good * facts[:, 1]).nansum(), "rejected_units": (~good * facts[:, 2]).nansum()}
        return {**super().sums(output, batch), **counts}


def answer_scores(output: ModelOutput, batch: Batch) -> Tensor:
    """The log-probability of each answer, summed over its tokens, shape (P,)."""
    return by_sequence(predicted(output, batch), batch.targets["counts"])


def longest_first(rows: Sequence[Rows]) -> tuple[Array, Array]:
    """The lengths of all prompts, and the lengths of all answers; each array is sorted in descending order."""
    each = (some[index].parts[f"{SIDE}_trained"] for some in rows for index in range(len(some)))
    lengths = np.array([(start := int(np.argmax(trained)), len(trained) - start) for trained in each], np.int32)
    prompts, answers = np.sort(lengths, axis=0)[::-1].T  # (rows,) each
    return prompts, answers


def balance_notes(settings: KtoSettings, rows: Rows) -> tuple[str, ...]:
    """A note if the weights do not compensate for different numbers of good and bad rows."""
    good = sum(bool(rows[index].parts["label"][0]) for index in range(len(rows)))
    bad = len(rows) - good
    ratio = settings.desirable_weight * good / (settings.undesirable_weight * bad) if bad else math.inf
    if 1 / MOST_RATIO <= ratio <= MOST_RATIO or not good + bad:
        return ()
    what = "choose weights so that desirable_weight * (good answers) is about undesirable_weight * (bad answers)"
    return (f"{good:,} good and {bad:,} bad answers: {what}",)


def _labels(batch: Batch) -> list[bool]:
    return [bool(row.parts["label"][0]) for row in batch.rows]


def _balance(apart: Sequence[float], labels: Sequence[bool]) -> tuple[float, ...]:
    """The KL and two factors. The KL is the mean log-ratio of mismatched answers, but at least 0. The factors are the
    number of all rows divided by the number of good rows, and by the number of bad rows."""
    count, good = len(labels), sum(labels)
    sides = (count / side if side else math.inf for side in (good, count - good))
    return max(math.fsum(apart) / max(len(apart), 1), 0.0), *sides


def _prompt(row: Row) -> bytes:
    return row.parts[SIDE][: int(np.argmax(row.parts[f"{SIDE}_trained"]))].tobytes()


def _others(prompts: Sequence[bytes]) -> list[int]:
    """For each row, the index of the nearest row before it with a different prompt; the row before the first one is the
    last one. If all prompts are equal, the index of the previous row."""
    others = [(place - 1) % len(prompts) for place in range(len(prompts))]
    if len(set(prompts)) > 1:
        for place in [*range(len(prompts))] * 2:  # twice, because the first rows may have the last row's prompt
            if prompts[place - 1] == prompts[place]:
                others[place] = others[place - 1]
    return others


def _answer(row: Row) -> IdsAndMarks:
    ids, trained = row.parts[SIDE], row.parts[f"{SIDE}_trained"]
    start = int(np.argmax(trained))
    return ids[start:], trained[start:]


def _mismatched(run: RunView, batch: Batch, other: Callable[[Row], IdsAndMarks]) -> Batch:
    """The batch with exchanged answers: each row gets the answer that `other` returns for it. Rows are truncated only
    at data.max_length and at the model's number of positions."""
    rows, longest = run.rows, _most_tokens(run)

    def joined(row: Row) -> Row:
        ids, trained = row.parts[SIDE], row.parts[f"{SIDE}_trained"]
        prompt = slice(int(np.argmax(trained)))
        pairs = zip((ids, trained), other(row), strict=True)
        ids, trained = (np.concatenate([own[prompt], theirs])[:longest] for own, theirs in pairs)
        return rows.make_row({**row.parts, SIDE: ids, f"{SIDE}_trained": trained}, row.origin, row.number)

    return rows.with_rows(batch, map(joined, batch.rows))


def _longest(run: RunView, batch: Batch, lengths: tuple[Array, Array]) -> Batch:
    """The batch with mismatched rows of the largest possible lengths: the longest prompt with the longest answer,
    the second longest prompt with the second longest answer, and so on."""
    rows, longest, remade = run.rows, _most_tokens(run), list[Row]()
    for place, row in enumerate(batch.rows):
        prompt, answer = (int(each[min(place, len(each) - 1)]) for each in lengths)
        trained = (np.arange(prompt + answer) >= prompt)[:longest]
        parts = {**row.parts, SIDE: np.resize(row.parts[SIDE], len(trained)), f"{SIDE}_trained": trained}
        remade.append(rows.make_row(parts, row.origin, row.number))
    return rows.with_rows(batch, remade)


def _most_tokens(run: RunView) -> int | None:
    """The largest number of tokens of a mismatched row; None if there is no limit."""
    model = run.model
    positions = model.base.family.learned_positions(model.base.net) or 0
    limits = (run.rows.options.max_length, positions and positions - model.virtual_tokens)
    return min(filter(None, limits), default=None)
