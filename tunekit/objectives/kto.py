"""Kahneman-Tversky optimization: single answers, each marked as a good or a bad one, held to the model at step 0.

Comes in: unpaired rows, then a Batch and the model's output.  Goes out: rows, then Loss (sum over rows).
Source: Ethayarajh et al. 2024, eq. 7; names and formulas are those of trl 1.16.  What differs by design: the KL is one
number for the whole step of all ranks (of an evaluation, for all of its rows), where trl has one for each micro-batch;
for it, each prompt is followed by the answer of the row before it in the files' order, not in that of the batch, and
cut at the longest row of the step instead of max_length; the policy's KL is computed without dropout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunekit.contracts import Batch, Gather, ModelOutput, Row, Rows, Sums, Tokenizer, Window
from tunekit.machine.devices import wide
from tunekit.machine.placing import placed
from tunekit.objectives.answers import AnswerObjective
from tunekit.recipe.objectives.kto import LOGGED, KtoSettings

MOST_RATIO = 4 / 3  # of the weighted numbers of good and bad rows; eq. 8
Answer = tuple[Any, Any]  # (T,) ids and marks


class Kto(AnswerObjective):
    """loss = sum over rows of w s(beta (kl - r)) of a good answer, of w s(beta (r - kl)) of a bad one.

    s is the logistic function, r log of policy over reference, w the weight of its side; kl 0 with apo_zero_unpaired.
    """

    sides, beside = ("completion",), {"label": "?"}
    metrics: Sequence[str] = ("loss", *LOGGED)
    logged: Sequence[str] = LOGGED
    facts_of_rows: tuple[float, ...] | None = None  # of evaluation rows, which decide them together

    def __init__(self, settings: KtoSettings, tokenizer: Tokenizer, notes: Sequence[str] = ()) -> None:
        super().__init__(settings, tokenizer)
        self.settings, self.notes = settings, notes

    def informed(self, rows: Sequence[Rows], template: str | None = None) -> Kto:
        """With a note where the weights do not make up for different numbers of good and bad rows."""
        good = sum(bool(rows[0][index].parts["label"][0]) for index in range(len(rows[0])))
        bad, settings = len(rows[0]) - good, self.settings
        ratio = settings.desirable_weight * good / (settings.undesirable_weight * bad) if bad else math.inf
        if 1 / MOST_RATIO <= ratio <= MOST_RATIO or not good + bad:
            return self
        what = "desirable_weight times the former is best about undesirable_weight times the latter"
        return Kto(settings, self.tokenizer, (f"{good:,} good and {bad:,} bad answers: {what}",))

    def measuring(self, model: Any, rows: Rows, batches: Iterable[Batch], gather: Gather) -> Kto:
        """With the KL of all evaluation rows, so that it does not depend on their batches."""
        found, longest = copy(self), int(np.asarray(rows.sizes).max(initial=0))

        def before(row: Row) -> Answer:
            return self._answer(rows[(row.number - 1) % len(rows)])

        apart, labels = list[float](), list[bool]()
        for batch in batches:
            labels += self._labels(batch)
            if self.settings.loss_type == "kto":
                mismatched = self._mismatched(batch, before, longest)
                ours, theirs = (model.scored([mismatched], self.scored, bypassed=each)[0] for each in (False, True))
                apart += (ours - theirs).tolist()
        found.facts_of_rows = self._facts(gather(apart), gather(labels))
        return found

    def prepare(self, model: Any, window: Window, gather: Gather = list) -> Window:
        """Each row with the reference's score, the step's KL, and what makes sums over all rows means of one side."""
        estimated = self.settings.loss_type == "kto" and self.facts_of_rows is None
        mismatched = self._mismatched_window(window, gather) if estimated else []
        reference = self.referenced(model, window.batches, mismatched)
        own, rest = reference[: len(window.batches)], reference[len(window.batches) :]
        policy = model.scored(mismatched, self.scored) if mismatched else []
        apart = [value for ours, theirs in zip(policy, rest, strict=True) for value in (ours - theirs).tolist()]
        labels = [label for batch in window.batches for label in self._labels(batch)]
        facts = np.array(self.facts_of_rows or self._facts(gather(apart), gather(labels)), np.float32)  # (3,)
        parts = [{"reference": self.by_row(scores), "facts": np.tile(facts, (len(scores), 1))} for scores in own]
        return self.with_all(window, parts)

    def _labels(self, batch: Batch) -> list[bool]:
        return [bool(row.parts["label"][0]) for row in batch.rows]

    def _facts(self, apart: Sequence[float], labels: Sequence[bool]) -> tuple[float, ...]:
        """Mean log-ratio of mismatched answers, not below 0; all rows over the good ones, and over the bad ones."""
        count, good = len(labels), sum(labels)
        sides = (count / side if side else math.inf for side in (good, count - good))
        return max(math.fsum(apart) / max(len(apart), 1), 0.0), *sides

    def _mismatched_window(self, window: Window, gather: Gather) -> list[Batch]:
        """Each batch with answers of other rows: of the one before, by number, among the rows of all ranks."""
        mine = [(row.number, row.size, self._answer(row)) for batch in window.batches for row in batch.rows]
        numbers, sizes, answers = zip(*sorted(gather(mine), key=lambda one: one[0]), strict=True)
        before = {number: answers[numbers.index(number) - 1] for number in numbers}  # of equal rows the first one's
        return [self._mismatched(batch, lambda row: before[row.number], max(sizes)) for batch in window.batches]

    def _answer(self, row: Row) -> Answer:
        ((ids, trained),) = self.marked(row)
        first = int(np.argmax(trained))
        return ids[first:], trained[first:]

    def _mismatched(self, batch: Batch, other: Callable[[Row], Answer], longest: int) -> Batch:
        """Each row's prompt with the answer of another one, cut at so many tokens."""

        def joined(row: Row) -> Row:
            ((ids, trained),) = self.marked(row)
            prompt = slice(int(np.argmax(trained)))
            pairs = zip((ids, trained), other(row), strict=True)
            joint = [np.concatenate([mine[prompt], theirs])[:longest] for mine, theirs in pairs]
            return self.make_row([(joint[0], joint[1])], row.parts, row.origin, row.number)

        return self.remade(batch, map(joined, batch.rows))

    def compared(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Sums]:
        """(P,) loss of each row, and sums over rows of what is logged."""
        scores = self.scored(output, batch)  # (P,)
        given = {name: placed(batch.targets[name], scores.device) for name in ("reference", "label", "facts")}
        good, (kl, *balance) = given["label"][:, 0], given["facts"].T
        ratio = scores - given["reference"][:, 0]
        sign = torch.where(good, 1.0, -1.0)
        weight = torch.where(good, self.settings.desirable_weight, self.settings.undesirable_weight)
        losses = weight * (sign * self.beta * (kl - ratio)).sigmoid()
        sides = [wide(side) * share for side, share in zip((good, ~good), balance, strict=True)]  # (P,), mean 1
        reward, logps = self.beta * wide(ratio.detach()), wide(scores.detach())
        rewards = [reward * side for side in sides]
        found = (*rewards, rewards[0] - rewards[1], *(logps * side for side in sides), wide(kl))
        return losses, {name: values.sum() for name, values in zip(LOGGED, found, strict=True)}


def make(settings: KtoSettings, processor: Tokenizer, facts: Mapping[str, Any]) -> Kto:
    """The objective of `objective: kto`."""
    return Kto(settings, processor)
