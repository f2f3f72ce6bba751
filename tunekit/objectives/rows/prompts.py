"""Rows of prompts, before and after the model has generated their completions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunekit.contracts import Array, Batch, Row, RowLayout, RowParts, Span, StepBatches, Tensors
from tunekit.data.encoding.outcomes import Dropped
from tunekit.errors import DataError
from tunekit.formats.prompt import PromptExample
from tunekit.objectives.rows.answers import NO_PROMPT, AnswerRows
from tunekit.objectives.rows.text import TextRows
from tunekit.records import JsonObject

PER_TOKEN = ("old", "reference", "kl")  # parts SIDE_NAME of a prepared row, with one value for each predicted token
PER_COMPLETION = ("advantages", "weights")  # parts of a prepared row with one value for each completion
PER_ROW = ("share", "rewards", "ended", "lengths")


@dataclass(frozen=True)
class Sample:
    """A completion that the model generated: its text and its ids, with the stop token if there is one. `ended`:
    whether a stop token ended the completion."""

    ids: list[int]
    ended: bool
    text: str


@dataclass(frozen=True)
class Completion:
    """A completion in the form that reward functions read: the row's prompt (a text or messages), the row's columns,
    and the completion's text. `origin`: the row's file and line, for errors; `ids`: the completion's ids with the stop
    token, or None if no tokenizer is loaded."""

    prompt: str | list[JsonObject]
    columns: Mapping[str, Any]
    text: str
    origin: str = ""
    ids: Sequence[int] | None = field(default=None, compare=False)

    @property
    def formatted(self) -> str | list[JsonObject]:
        """The completion in the same form as the prompt: a text, or a list with one message."""
        return self.text if isinstance(self.prompt, str) else [{"role": "assistant", "content": self.text}]


@dataclass(frozen=True, eq=False, kw_only=True)
class PromptRows(TextRows):
    """Rows of prompts. Parts: `prompt` (T,), the prompt's ids; `context`, the JSON that reward functions read. A prompt
    with its completions (a group) becomes one row of the kind `answers`, so that micro-batches never split a group.

    `count`: the number of completions for a prompt; `longest`: the maximum number of tokens in a completion;
    `unusable`: error or drop, for a row without a prompt; `masks_truncated`: whether the loss ignores completions
    without a stop token.
    """

    answers: AnswerRows
    count: int
    longest: int
    unusable: str
    masks_truncated: bool
    example = "prompt"
    packable = True
    room = " with room for objective.max_completion_length"
    allowed_options = (
        ("train_on", "assistant", "the model learns from its own completions, not from the text of the rows"),
        ("excess_length", "drop or error", "a truncated prompt is a different question"),
    )

    @cached_property
    def layout(self) -> RowLayout:
        """The layout of prompts without completions."""
        return RowLayout({"prompt": "<i4", "context": "u1"}, ("prompt",), self.count, paired=True)

    def encode(self, example: PromptExample, origin: str) -> Row:
        """The row of an example. Raises: Dropped or DataError (the recipe chooses which) if the example has no
        prompt."""
        if not example.prompt:
            if self.unusable == "drop":
                raise Dropped(NO_PROMPT)
            raise DataError(f"the row has {NO_PROMPT}", "correct the row, or write objective.unusable_rows: drop")
        context = np.frombuffer(context_json(example).encode(), np.uint8)
        return self.make_row({"prompt": np.asarray(self._ids(example), np.int32), "context": context}, origin)

    def prompt(self, example: PromptExample) -> tuple[list[int], str] | None:
        """The ids of the prompt, and the reference answer; None if the example has no reference answer."""
        return None if example.answer is None else (self._ids(example), example.answer)

    def _ids(self, example: PromptExample) -> list[int]:
        prompt = self.renderer.prompt(example.answered("an answer"))
        assert prompt is not None
        return prompt[0]

    def sizes_of(self, parts: RowParts) -> tuple[int, ...]:
        """The sizes of the row with its completions. Before sampling, each completion counts with the maximum
        length."""
        if "prompt" not in parts:
            return self.answers.sizes_of(parts)
        return (len(parts["prompt"]) + self.longest,) * self.count

    def units_in(self, parts: RowParts) -> int:
        """The number of completions."""
        return self.count if "prompt" in parts else len(self.answers.sides)

    def evaluation_copy(self) -> PromptRows:
        """A copy of the rows for evaluation, with one completion for each prompt."""
        return replace(self, answers=replace(self.answers, sides=self.answers.sides[:1]))

    def laid_out(self, end_to_end: bool, shares_prefixes: bool = False) -> PromptRows:
        """A copy of the rows. Its completions are laid out in the same way as in AnswerRows.laid_out."""
        return replace(self, answers=self.answers.laid_out(end_to_end, shares_prefixes))

    def shared(self, row: Row) -> int:
        """The prompt's tokens times the number of completions after the first. 0 if the prompt is computed for each
        completion."""
        if "prompt" not in row.parts:
            return self.answers.shared(row)
        return len(row.parts["prompt"]) * (len(self.answers.sides) - 1) if self.answers.shares_prefixes else 0

    def cut(self, row: Row, start: int, stop: int) -> Row:
        """The row with a shorter prompt, so that prompt and completion have at most this size. A training run never
        cuts prompts."""
        longest = min(self.longest, max(stop - start - 1, 0))
        return self._with_prompt(row, row.parts["prompt"][start : max(stop - longest, start + 1)])

    def fill(self, rows: Iterator[Row], size: int, part: int) -> list[Row]:
        """A row of this size: its prompt together with the longest completion."""
        row = next(rows)
        return [self._with_prompt(row, np.resize(row.parts["prompt"], max(size - self.longest, 1)))]

    def _with_prompt(self, row: Row, ids: Array) -> Row:
        return self.make_row({**row.parts, "prompt": ids}, row.origin, row.number)

    def spans(self, row: Row) -> list[Span]:
        """The prompt, for preview. It is not trained on. The title states the columns that reward functions read."""
        columns = {name: value for name, value in read_context(row)["columns"].items() if value is not None}
        values = "".join(f", {name}: {value}" for name, value in columns.items())
        ids = row.parts["prompt"]
        return [Span(ids, np.zeros(len(ids), np.bool_), title=f"prompt{values}")]

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Make the batch, in the layout of `answers` rows. A prompt without completions gets completions of the maximum
        length."""
        if any("prompt" in row.parts for row in sequences[0]):
            completed = [[self.completed(row, self.longest_samples(row)) for row in some] for some in sequences]
            batch = self.answers.laid(completed)
            return replace(batch, targets={}, sequences=tuple(map(tuple, sequences)))
        batch = self.answers.laid(sequences)
        return replace(batch, targets={**batch.targets, **self._prepared(batch.rows)})

    def longest_samples(self, row: Row) -> list[Sample]:
        """Completions of the maximum length, for a simulated or dry-run step."""
        ids = np.resize(row.parts["prompt"], self.longest).tolist()
        return [Sample(ids, True, "")] * len(self.answers.sides)

    def completed(self, row: Row, group: Sequence[Sample]) -> Row:
        """The row made from a prompt's row and its completions."""
        prompt = row.parts["prompt"]
        parts: dict[str, Any] = {"prompt_size": np.array([len(prompt)])}
        for side, sample in zip(self.answers.sides, group, strict=True):
            counts = sample.ended or not self.masks_truncated
            parts[side] = np.concatenate([prompt, np.asarray(sample.ids, np.int32)])
            parts[f"{side}_trained"] = np.append(np.zeros(len(prompt), np.bool_), np.full(len(sample.ids), counts))
        return self.make_row(parts, row.origin, row.number)

    def with_tokens(self, step: StepBatches, name: str, values: Sequence[Tensor]) -> StepBatches:
        """Add a value for each predicted token to the step's rows. Shapes: values (N,) for each batch."""
        parts = []
        for batch, numbers in zip(step.batches, values, strict=True):
            split = [part.numpy() for part in torch.split(numbers.float(), batch.targets["counts"].tolist())]
            count, sides = len(batch.rows), self.answers.sides
            parts.append({f"{side}_{name}": split[at * count :][:count] for at, side in enumerate(sides)})
        return self.with_parts(step, parts)

    def _prepared(self, rows: Sequence[Row]) -> Tensors:
        """The values that a step added to the rows, as tensors: (N,) for tokens and (G P,) for completions, in the
        order of the predicted tokens; (P, ...) for rows."""
        parts, sides, prepared = rows[0].parts, self.answers.sides, dict[str, Array]()
        for name in (name for name in PER_TOKEN if f"{sides[0]}_{name}" in parts):
            prepared[name] = np.concatenate([row.parts[f"{side}_{name}"] for side in sides for row in rows])
        for name in (name for name in PER_COMPLETION if name in parts):
            prepared[name] = np.stack([row.parts[name] for row in rows], axis=1).reshape(-1)
        for name in (name for name in PER_ROW if name in parts):
            prepared[name] = np.stack([row.parts[name] for row in rows])
        return {name: torch.from_numpy(values) for name, values in prepared.items()}


def completions_of(rows: Sequence[Row], groups: Sequence[Sequence[Sample]]) -> list[Completion]:
    """The completions of all rows, in the form that reward functions read."""
    return [
        Completion(**read_context(row), text=sample.text, origin=row.origin, ids=sample.ids)
        for row, group in zip(rows, groups, strict=True)
        for sample in group
    ]


def context_json(example: PromptExample) -> str:
    """The JSON of an example's prompt and columns, which is stored in the row for reward functions."""
    columns = {"answer": example.answer, **example.columns}
    return json.dumps({"prompt": example.prompt_value, "columns": columns}, default=str, ensure_ascii=False)


def read_context(row: Row) -> JsonObject:
    """The prompt and the columns of a row."""
    return json.loads(row.parts["context"].tobytes())
