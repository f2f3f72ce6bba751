"""Rows with one answer to a prompt, or with several answers to the same prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tunekit.contracts import (
    Array,
    Batch,
    EncodeOptions,
    LossKind,
    Objective,
    Row,
    RowLayout,
    RowParts,
    Span,
    Tensors,
    Tokenizer,
)
from tunekit.data.batching.pad import lay_end_to_end, positions
from tunekit.data.encoding.outcomes import Dropped
from tunekit.errors import DataError
from tunekit.formats.preference import PromptedExample, TextOrTurns, asks_again
from tunekit.objectives.base import row_fingerprint
from tunekit.objectives.rows.text import TextRows, text_answering
from tunekit.recipe.bases.pair_settings import PairSettings

SIDES = ("chosen", "rejected")
NO_PROMPT = "no prompt"
EMPTY_ANSWER = "an empty answer"
EQUAL = "the chosen and the rejected answer are the same"
NOT_ANSWERED = "an answer whose last message is not from the assistant"
ASKS_AGAIN = "an answer that begins with a turn of the user or the system, although the row has a prompt"
Places = dict[tuple[int, str], NDArray[Any]]  # (T,) positions in the flattened ids, by row number and side


@dataclass(frozen=True, eq=False)
class AnswerRows(TextRows):
    """Rows with one or more answers, called sides. Parts for each side: `SIDE` (T,), the ids of prompt and answer;
    `SIDE_trained` (T,), whether each id is trained on.

    All sides of a row are packed into one line of the batch if the model separates packed documents, or if lines have
    several rows. Each side is then a document with its prompt. Otherwise each side is a padded line.
    `shares_prefixes`: the common beginning of packed sides is computed once.

    `sides`: names of an example's fields with answers; `further`: dtypes of other fields with one value each;
    `unusable`: error or drop, the recipe's value of `unusable_key`; `prompts`: the prompt of the first side is
    predicted too;
    `scored`: a head scores each side at its last token, and no token is predicted.
    """

    example: str = "preference"
    sides: tuple[str, ...] = SIDES
    further: Mapping[str, str] = field(default_factory=dict)
    unusable: str = "error"
    unusable_key: str = "unusable_pairs"
    prompts: bool = False
    scored: bool = False
    end_to_end: bool = False
    shares_prefixes: bool = False
    packable = True
    has_reasoning = True
    allowed_options = (
        ("train_on", "assistant", "this objective compares answers, so it trains only on the assistant's text"),
        ("excess_length", "drop, truncate or error", "if an answer were split, its later pieces would have no prompt"),
    )

    @cached_property
    def layout(self) -> RowLayout:
        """The layout of a row: the ids and marks of every side, then the fields in `further`."""
        parts = {name: kind for side in self.sides for name, kind in ((side, "<i4"), (f"{side}_trained", "?"))}
        return RowLayout({**parts, **self.further}, self.sides, len(self.sides), paired=len(self.sides) > 1)

    def encode(self, example: PromptedExample, origin: str) -> Row:
        """The row of an example. Raises: Dropped or DataError (the recipe chooses which) if the example is unusable."""
        answers = [getattr(example, side) for side in self.sides]
        self._check_usable(example.prompt, answers)
        before = self.notices.copy()
        encoded = [self.renderer.sequence(example.answered(answer)) for answer in answers]
        if any(((weights > 0) & (weights != 1)).any() for _, weights in encoded):
            raise DataError(
                "a message has a 'weight' other than 0 and 1, but answers cannot be weighted", "write 0 or 1"
            )
        for notice, count in (self.notices - before).items():
            self.notices[notice] -= count - 1  # count once per row, not once per answer
        parts: dict[str, Array] = {}
        for side, (ids, weights) in zip(self.sides, encoded, strict=True):
            parts |= {side: np.asarray(ids, np.int32), f"{side}_trained": weights > 0}
        parts |= {name: np.asarray([getattr(example, name)], kind) for name, kind in self.further.items()}
        return self.make_row(parts, origin)

    def _check_usable(self, prompt: TextOrTurns, answers: Sequence[TextOrTurns]) -> None:
        last = [answer[-1] for answer in answers if answer and isinstance(answer, tuple)]
        empty = not all(answers) or any(turn.empty for turn in last)
        reasons = {NO_PROMPT: not prompt, EMPTY_ANSWER: empty}
        reasons[NOT_ANSWERED] = any(turn.role != "assistant" for turn in last)
        reasons[ASKS_AGAIN] = any(asks_again(prompt, answer) for answer in answers)
        reasons[EQUAL] = len(answers) > 1 and answers[0] == answers[1]
        for reason in (reason for reason, applies in reasons.items() if applies):
            if self.unusable == "drop":
                raise Dropped(reason)
            what = reason if reason == EQUAL else f"the row has {reason}"
            raise DataError(what, f"correct the row, or write objective.{self.unusable_key}: drop")

    def sizes_of(self, parts: RowParts) -> tuple[int, ...]:
        """For each answer, the number of tokens of the answer and its prompt."""
        return tuple(len(parts[side]) for side in self.sides)

    def units_in(self, parts: RowParts) -> int:
        """1, or 0 if an answer is empty."""
        return int(all(parts[f"{side}_trained"][1:].any() for side in self.sides))

    def prompt(self, example: PromptedExample) -> tuple[list[int], str] | None:
        """The ids of the prompt, and the text of the first answer."""
        return self.renderer.prompt(example.answered(getattr(example, self.sides[0])))

    def laid_out(self, end_to_end: bool, shares_prefixes: bool = False) -> AnswerRows:
        """A copy of the rows with a new layout. If `end_to_end`, all sides of a row are in one line; otherwise each
        side has its own line."""
        shares = end_to_end and shares_prefixes and len(self.sides) > 1
        return replace(self, end_to_end=end_to_end, shares_prefixes=shares)

    def shared(self, row: Row) -> int:
        """The number of tokens that later sides share with the first side, and that the model therefore need not
        compute again."""
        return self.prefix(row) * (len(self.sides) - 1)

    def prefix(self, row: Row) -> int:
        """The length of the prefix that all sides share and that is computed once. It is shorter than every side."""
        if not self.shares_prefixes:
            return 0
        if "prompt_size" in row.parts:
            return int(row.parts["prompt_size"][0])
        shortest = min(self.sizes_of(row.parts)) - 1
        first, second = (row.parts[side][:shortest] for side in self.sides)
        return int(np.argmin(np.append(first == second, False)))

    def cut(self, row: Row, start: int, stop: int) -> Row:
        """The row with the tokens from start to stop-1 of each side."""
        names = [name for side in self.sides for name in (side, f"{side}_trained")]
        cut = {name: row.parts[name][start:stop] for name in names}
        return self.make_row({**row.parts, **cut}, row.origin, row.number)

    def fill(self, rows: Iterator[Row], size: int, part: int) -> list[Row]:
        """A row whose sides all have this size. All its tokens are trained on, and the sides share almost no prefix."""
        row, parts = next(rows), dict[str, Array]()
        for side, way in zip(self.sides, (1, -1), strict=False):  # the second side backwards
            parts |= {side: np.resize(row.parts[side][::way], size), f"{side}_trained": np.ones(size, np.bool_)}
        return [self.make_row({**row.parts, **parts}, row.origin, row.number)]

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Make the batch. Fields in `further`, and values that a step added to the rows, become targets (P, ...), for P
        rows."""
        batch = self.laid(sequences)
        rows, sides = batch.rows, {name for side in self.sides for name in (side, f"{side}_trained")}
        names = [name for name in rows[0].parts if name not in sides]
        further = {name: torch.from_numpy(np.stack([row.parts[name] for row in rows])) for name in names}
        return replace(batch, targets={**batch.targets, **further})

    def laid(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Make the batch, with targets for the sides' tokens only.

        Shapes: input_ids, position_ids (B, T), or (S P, T) if each of the S sides of the P rows has its own sequence.
        """
        rows = [row for sequence in sequences for row in sequence]
        lines = self._lines(sequences)
        shared = [self.prefix(row) for row in rows]
        skipped = [[shared[number] if side != self.sides[0] else 0 for number, side in line] for line in lines]
        arrays = [
            [rows[number].parts[side][skip:] for (number, side), skip in zip(*pair, strict=True)]
            for pair in zip(lines, skipped, strict=True)
        ]
        ids = lay_end_to_end(arrays, self.tokenizer.pad_id)  # (B, T)
        places: Places = {}
        for line, (documents, skips) in enumerate(zip(lines, skipped, strict=True)):
            start = line * ids.shape[1]
            for (number, side), skip, array in zip(documents, skips, arrays[line], strict=True):
                before = places[number, self.sides[0]][:skip] if skip else np.empty(0, np.int64)
                places[number, side] = np.concatenate([before, np.arange(start, start + len(array))])
                start += len(array)
        inputs = {"input_ids": ids, "position_ids": positions([list(map(len, line)) for line in arrays], skipped)}
        targets = self._last_tokens(rows, places) if self.scored else self._predicted(rows, places)
        filled = tuple(sum(map(len, line)) for line in arrays)
        return Batch(inputs, targets, tuple(map(tuple, sequences)), filled=filled)

    def _lines(self, sequences: Sequence[Sequence[Row]]) -> list[list[tuple[int, str]]]:
        """The documents in each line of the batch, as pairs (row's index in the batch, side)."""
        count = sum(map(len, sequences))
        if not self.end_to_end and count == len(sequences):
            return [[(number, side)] for side in self.sides for number in range(count)]
        starts = np.cumsum([0, *map(len, sequences)]).tolist()
        return [
            [(start + place, side) for place in range(len(sequence)) for side in self.sides]
            for start, sequence in zip(starts, sequences, strict=False)
        ]

    def _predicted(self, rows: Sequence[Row], places: Places) -> Tensors:
        """The targets `counts`, `index` and `ids`. They list all first answers, then all second answers, and so on;
        then all prompts, if prompts are predicted. `counts` (S P,): the number of predicted tokens of each answer or
        prompt. `index`, `ids` (N,): the positions and ids of these tokens."""
        groups = [(number, side, True) for side in self.sides for number in range(len(rows))]
        groups += [(number, self.sides[0], False) for number in range(len(rows))] if self.prompts else []
        index, targets = list[NDArray[Any]](), list[NDArray[Any]]()
        for number, side, trained in groups:
            chosen = np.flatnonzero(rows[number].parts[f"{side}_trained"][1:] == trained)
            index.append(places[number, side][chosen])
            targets.append(rows[number].parts[side][1:][chosen])
        arrays = {"index": np.concatenate(index), "ids": np.concatenate(targets).astype(np.int64)}
        counts = torch.tensor(list(map(len, index)))
        return {**{name: torch.from_numpy(values) for name, values in arrays.items()}, "counts": counts}

    def _last_tokens(self, rows: Sequence[Row], places: Places) -> Tensors:
        """The target `last` (2 P,): the positions where the chosen answers are scored, then the positions where the
        rejected answers are scored."""
        order = [(number, side) for side in self.sides for number in range(len(rows))]
        last = [
            int(places[number, side][last_token(rows[number].parts[side], self.tokenizer.pad_id)])
            for number, side in order
        ]
        return {"last": torch.tensor(last)}

    def spans(self, row: Row) -> list[Span]:
        """The sides of the row, for preview. Each title states the fields in `further`. A side's first token is never
        predicted."""
        values = "".join(f", {name}: {row.parts[name][0]}" for name in self.further)
        marks = {side: row.parts[f"{side}_trained"] for side in self.sides}
        predicted = {
            side: np.zeros_like(trained) if self.scored else np.append(False, trained[1:])
            for side, trained in marks.items()
        }
        return [Span(row.parts[side], predicted[side], title=side + values) for side in self.sides]


def last_token(ids: Sequence[int] | Array, pad_id: int) -> int:
    """The last position whose id is not the padding id. transformers reads a score at this position."""
    return int(np.flatnonzero(np.asarray(ids) != pad_id).max(initial=0))


def pair_rows(settings: PairSettings, tokenizer: Tokenizer, options: EncodeOptions) -> AnswerRows:
    """Rows of pairs: a preferred and a rejected answer to the same prompt."""
    return AnswerRows(tokenizer, row_fingerprint(settings, tokenizer), options, unusable=settings.unusable_pairs)


def pair_objective(
    settings: PairSettings, tokenizer: Tokenizer, options: EncodeOptions, loss: LossKind, *, prompts: bool = False
) -> Objective:
    """Make an objective whose rows are pairs of answers, and whose model generates text. `prompts`: as in
    AnswerRows."""
    rows = replace(pair_rows(settings, tokenizer, options), prompts=prompts)
    return Objective(settings.method, settings.family, rows, loss, text_answering(tokenizer))
