"""The four lists of ranked training rows as pages, texts and plain values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tunekit.artifacts.report.rank_page import RankedList, RankedRow
from tunekit.contracts import Tokenizer
from tunekit.data.rows import RowSet
from tunekit.evaluation.row_losses import RowLosses
from tunekit.evaluation.row_ranking import (
    AGAINST,
    DUPLICATES,
    NOTHING,
    WRONG,
    Numbers,
    RowFacts,
    RowNumbers,
    earlier,
    row_lists,
)

PAGE_ROWS, SHOWN_NEAR, SHOWN_CHARACTERS = 50, 3, 60  # rows of a list; neighbours of a row; of a text in the terminal
MEANINGS = {
    WRONG: "On average over the checkpoints, the model gives the labels or tokens of these rows a low probability. "
    "Rows that similar rows contradict are first. Rare but right rows are here too: read a row before you change it. "
    "A negative margin means that the model prefers a different label, or in a text a different token at the worst "
    "place. Marked text is trained on.",
    AGAINST: "A step on one of these rows raises the evaluation loss, by the gradients at the checkpoints. The "
    "influence is between -1 (the most harm) and 1.",
    NOTHING: "The loss of these rows was low before training and stayed low.",
    DUPLICATES: "An earlier row teaches the same.",
}


@dataclass(frozen=True)
class Ranking:
    """Everything that was measured about the rows of a run."""

    rows: RowSet
    facts: RowFacts
    steps: Sequence[int]
    tokenizer: Tokenizer | None
    influence_agreement: float | None = None  # rank correlation between two halves of the evaluation rows

    @cached_property
    def lists(self) -> dict[str, RowNumbers]:
        """The row numbers of each list, worst first."""
        return row_lists(self.facts)

    @cached_property
    def earlier(self) -> tuple[RowNumbers, Numbers]:
        """For each row, the nearest of the earlier rows with the same label, and its similarity."""
        return earlier(self.facts)

    @cached_property
    def texts(self) -> RowLosses:
        """Shows rows as text."""
        return RowLosses(self.rows.train, self.rows.objective, self.tokenizer)

    @cached_property
    def places(self) -> list[str]:
        """The file and line of each row."""
        return [self.rows.train[number].origin for number in range(len(self.rows.train))]

    def near(self, number: int) -> list[int]:
        """The numbers of the nearest rows."""
        return [int(other) for other in self.facts.near.rows[number][:SHOWN_NEAR]]

    def why(self, number: int, name: str) -> str:
        """Why a row is in a list."""
        facts = self.facts
        if name == AGAINST:
            return f"influence {facts.influence[number]:.3g} on the evaluation rows"
        if name == NOTHING:
            highest = max(facts.before[number], facts.losses[:, number].max())
            return f"loss {facts.before[number]:.3g} before training, never above {highest:.3g}"
        if name == DUPLICATES:
            rows, similarity = self.earlier
            return f"similarity {similarity[number]:.3f} to {self.places[int(rows[number])]}"
        parts = [f"mean loss {facts.mean[number]:.3g}, median of all rows {np.median(facts.mean):.3g}"]
        if len(facts.margin):
            parts.append(f"margin {facts.margin[number]:.3g}")
        if facts.labels and len(facts.disagreement):
            parts.append(f"{facts.disagreement[number]:.0%} of similar rows have a different label")
        return "; ".join(parts)

    def pages(self) -> list[RankedList]:
        """The four lists for the page."""
        return [self._page(name) for name in MEANINGS]

    def _page(self, name: str) -> RankedList:
        if name not in self.lists:
            missing = {
                AGAINST: "Not measured. The option --influence measures it, if the run has evaluation rows.",
                NOTHING: "Not measured: the state of the model before training is not known any more, or all rows have "
                "the same loss there, as in preference tuning.",
                DUPLICATES: "Not measured, because rows of this objective have no single hidden state.",
            }
            return RankedList(name, MEANINGS[name], missing=missing[name])
        numbers = [int(number) for number in self.lists[name]]
        shown = []
        for number in numbers[:PAGE_ROWS]:
            near = [(self.places[other], self._text(other)) for other in self.near(number)]
            shown.append(RankedRow(self.places[number], self._text(number), self.why(number, name), near))
        return RankedList(name, MEANINGS[name], shown, len(numbers))

    def _text(self, number: int) -> list[tuple[str, bool]]:
        return [(str(piece), bool(trained)) for piece, trained in self.texts.shown(number)["text"]]

    def short_text(self, number: int) -> str:
        """The beginning of a row's trained text, or of its whole text if no token is trained on. (Rows often have the
        same system prompt.) On one line; cut between words, if it has blanks."""
        pieces = self._text(number)
        trained = " ".join(piece for piece, is_trained in pieces if is_trained)
        text = " ".join((trained or "".join(piece for piece, _ in pieces)).split())
        beginning = text[: SHOWN_CHARACTERS - 4]
        return text if len(text) <= SHOWN_CHARACTERS else f"{beginning.rpartition(' ')[0] or beginning} ..."

    def json(self) -> dict[str, Any]:
        """The content of the --json file."""
        facts, wrong = self.facts, self.facts.wrongness()
        columns = {"before": facts.before, "after": facts.losses[facts.after], "mean": facts.mean}
        columns |= {"spread": facts.spread, "margin": facts.margin, "disagreement": facts.disagreement}
        columns |= {"influence": facts.influence, "wrong": wrong}
        measured = {name: values for name, values in columns.items() if len(values)}
        rows = [
            {"row": place, **{name: _finite(values[number]) for name, values in measured.items()}}
            for number, place in enumerate(self.places)
        ]
        lists = {name: [self.places[int(number)] for number in numbers] for name, numbers in self.lists.items()}
        return {"steps": list(self.steps), "rows": rows, "lists": lists}


def _finite(value: float) -> float | None:
    return float(f"{value:.7g}") if math.isfinite(value) else None
