"""Records the loss of each evaluation row under a name that is the same in every run, so that runs can be compared row
by row. Also records the text of the rows with the highest losses."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np

from tunekit.contracts import Objective, Row, Rows, Span, Tokenizer
from tunekit.evaluation.scores import EvaluationSums

WORST_ROWS = 8  # number of rows whose text a report shows
UNREADABLE = "\ufffd"  # in place of bytes that are not a whole character
MOST_STRETCHES, MOST_TRAINED, MOST_OTHERS = 6, 320, 140  # text pieces of a row; characters of a piece


@dataclass(frozen=True)
class RowLosses:
    """Evaluation rows, with names that identify the same row in every run."""

    rows: Rows
    objective: Objective
    tokenizer: Tokenizer | None

    @cached_property
    def names(self) -> dict[str, list[Any]]:
        """For each row: its file and line, a hash of all its parts, and the number of its units."""
        rows = [self.rows[number] for number in range(len(self.rows))]
        return {
            "rows": [row.origin for row in rows],
            "digests": [row_digest(row) for row in rows],
            "units": unit_counts(rows, self.objective),
        }

    def values(
        self,
        step: int,
        sums: EvaluationSums,
        answers: Mapping[str, Mapping[str, list[Any]]],
        earlier: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """The record of an evaluation. `rows`, `digests`, `units`, `losses` and `before` are lists with one value per
        row; `worst` lists the rows with the highest losses as text. `metrics` has {digests, values} for each metric
        that is a mean over rows.
        `answers`: the metrics of generated and chosen answers. `earlier`: the record of the previous evaluation. The
        losses before training are copied from it."""
        now = [_short(sums.row_losses[number]) for number in range(len(self.rows))]
        before = None if earlier is None else earlier["losses" if earlier["step"] == 0 else "before"]
        metrics = dict(answers)
        if len(sums.row_right) == len(self.rows):
            right = [sums.row_right[number] for number in range(len(self.rows))]
            metrics = {"accuracy": {"digests": self.names["digests"], "values": right}, **metrics}
        values = {"step": step, **self.names, "losses": now, "before": before if step else None, "metrics": metrics}
        pairs = zip(now, self.names["units"], strict=True)
        means = [math.inf if loss is None else loss / (units or 1) for loss, units in pairs]
        order = np.argsort(-np.asarray(means), kind="stable")
        return {**values, "worst": [self.shown(int(number)) for number in order[:WORST_ROWS]] if step else []}

    def shown(self, number: int) -> dict[str, Any]:
        """A row as text: {number, text: [[piece, trained]]}. `trained` states whether the piece is trained on."""
        text: list[tuple[str, bool]] = []
        for part in self.objective.rows.spans(self.rows[number]):
            gap, more = "\n" if text else "", " [...]" if len(part.title) > MOST_OTHERS else ""
            title = f"{gap}{part.title[:MOST_OTHERS]}{more}\n"
            text += [*([(title, False)] if part.title else []), *short_segments(part, self.tokenizer)]
        if len(text) > MOST_STRETCHES:
            text = [*text[:2], ("\n...\n", False), *text[2 - MOST_STRETCHES :]]
        return {"number": number, "text": [list(stretch) for stretch in text]}


def unit_counts(rows: Rows | list[Row], objective: Objective) -> list[float]:
    """The number of units of each row. A row's loss is the sum over its units."""
    loss = objective.loss.evaluation_copy()
    return [float(loss.units(objective.rows.collate([[rows[number]]]))[0]) for number in range(len(rows))]


def segments(part: Span, tokenizer: Tokenizer | None) -> list[tuple[str, bool]]:
    """Pieces of a row's text, each with a flag that states whether it is trained on. A piece is decoded as a whole,
    because one character may have several tokens."""
    if tokenizer is None:
        return []
    return [(tokenizer.decode(ids), trained) for ids, trained in _pieces(part)]


def short_segments(part: Span, tokenizer: Tokenizer | None) -> list[tuple[str, bool]]:
    """The pieces of `segments`, with long pieces shortened to whole tokens at their beginning and end."""
    if tokenizer is None:
        return []
    limits = {True: MOST_TRAINED, False: MOST_OTHERS}
    return [(_shortened(ids, tokenizer, limits[trained]), trained) for ids, trained in _pieces(part)]


def _pieces(part: Span) -> list[tuple[list[int], bool]]:
    """The token ids of each piece. A piece contains only trained tokens, or only untrained tokens."""
    if not len(part.ids):
        return []
    trained = part.trained  # (T,)
    borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(trained)]
    return [(part.ids[start:stop].tolist(), bool(trained[start])) for start, stop in pairwise(borders)]


def text_digest(*parts: str | bytes) -> str:
    """A hash of texts that identifies the same row in every run."""
    digest = blake2b(digest_size=8)
    for part in parts:
        content = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        digest.update(f"{len(content)} ".encode() + content)
    return digest.hexdigest()


def row_digest(row: Row) -> str:
    """A hash of all parts of a row, equal for the copies of a row."""
    digest = blake2b(digest_size=8)
    for name, values in sorted(row.parts.items()):
        digest.update(f"{name} {len(values)} ".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _short(loss: float) -> float | None:
    """The loss with seven digits, the precision of float32. None if the loss is not finite, because JSON has no such
    numbers."""
    return float(f"{loss:.7g}") if math.isfinite(loss) else None


def _shortened(ids: list[int], tokenizer: Tokenizer, characters: int) -> str:
    """The text of the tokens. A long text is shortened to about `characters` characters: whole tokens from its
    beginning and its end. Incomplete characters are left out."""
    text = tokenizer.decode(ids)
    if len(text) <= characters:
        return text
    count = max(1, len(ids) * (characters // 2) // len(text))
    first, last = tokenizer.decode(ids[:count]), tokenizer.decode(ids[-count:])
    return f"{first.rstrip(UNREADABLE + ' ')} [...] {last.lstrip(UNREADABLE + ' ')}"
