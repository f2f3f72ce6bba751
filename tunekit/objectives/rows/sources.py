"""Rows for encoder-decoders: a source that the encoder reads, and an answer that the decoder learns."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from tunekit.contracts import IGNORED, Array, Batch, LossKind, Row, RowKind, RowLayout, RowParts, Span
from tunekit.data.batching.pad import lay_end_to_end, real_positions
from tunekit.data.encoding.outcomes import Dropped
from tunekit.data.rendering.render import EMPTY_ANSWER, NO_ANSWER, NO_WEIGHT
from tunekit.data.rendering.turns import answer_indices, last_answer
from tunekit.errors import DataError, ModelError
from tunekit.formats.example import ChatExample, CompletionExample, Example, TextExample
from tunekit.objectives.losses.choices import ChoiceLoss
from tunekit.objectives.rows.choices import LineByLineRows
from tunekit.objectives.rows.text import TextRows, as_source, fill_with

EMPTY_SOURCE = "empty prompt, so the encoder has nothing to read"
ONLY_LAST_ANSWER = (
    "conversations with several answers: only the last answer is trained on; the encoder reads the earlier answers"
)


@dataclass(frozen=True, eq=False)
class SourceRows(TextRows):
    """Rows for encoder-decoders. Parts: `source` (S,), ids with the tokenizer's special tokens around the text;
    `answer` (A + 1,), ids whose first token begins every answer and is not predicted; `weight` (1,), the weight of each
    predicted token."""

    example = "text"
    has_choices = True
    allowed_options = (
        ("train_on", "assistant or last", "the encoder reads the prompt, so prompt tokens cannot be trained on"),
        (
            "excess_length",
            "drop, truncate or error",
            "if a row were split, its later pieces would have no source for the encoder to read",
        ),
    )
    layout = RowLayout({"source": "<i4", "answer": "<i4", "weight": "<f4"}, ("source", "answer"), sizes=2)

    def encode(self, example: Example, origin: str) -> Row:
        """The row of an example.
        Raises: Dropped if nothing can be trained on; DataError if the example is wrong; ModelError if the base's
        configuration does not state the token that begins every answer."""
        if isinstance(example, TextExample):
            raise DataError("running text has no prompt for the encoder to read", "give a prompt and its completion")
        if isinstance(example, ChatExample):
            several = len(answer_indices(example.messages, self.options.train_on)) > 1
            self.notices.update([ONLY_LAST_ANSWER] if several else [])
        prompt = self.prompt(example)
        if prompt is None:
            raise Dropped(EMPTY_ANSWER if isinstance(example, CompletionExample) else NO_ANSWER)
        start = self.tokenizer.answer_start_id
        if start is None:
            what, how = (
                "the configuration of the base does not state the token that begins every answer",
                "add decoder_start_token_id to",
            )
            raise ModelError(what, f"{how} the base's config.json", key="model.name_or_path")
        source, answer = prompt[0], self.tokenizer.encode_answer(prompt[1])
        if not source:
            raise Dropped(EMPTY_SOURCE)
        if len(answer) == self._around_answers:
            raise Dropped(EMPTY_ANSWER)
        eos = self.tokenizer.eos_id
        answer = answer if eos is None or answer[-1:] == [eos] else [*answer, eos]
        weight = answer_weight(example)
        if not weight:
            raise Dropped(NO_WEIGHT)
        ids = (np.asarray(source, np.int32), np.asarray([start, *answer], np.int32))
        return self.make_row(source_parts(*ids, weight), origin)

    @cached_property
    def _around_answers(self) -> int:
        """The number of special tokens that the tokenizer puts around an answer."""
        return len(self.tokenizer.encode_answer(""))

    def sizes_of(self, parts: RowParts) -> tuple[int, ...]:
        return len(parts["source"]), self.units_in(parts)

    def units_in(self, parts: RowParts) -> int:
        return max(len(parts["answer"]) - 1, 0)

    def prompt(self, example: Example) -> tuple[list[int], str] | None:
        """The ids that the encoder reads, and the answer's text."""
        source = self.renderer.source(example)
        if source is None:
            return None
        text, ids, answer = source
        return (self.tokenizer.encode_source(text) if ids is None else as_source(self.tokenizer, ids)), answer

    def question(self, text: str, system: str | None = None) -> list[int]:
        """The ids that the encoder reads, made from a user's text and an optional system message."""
        if self.renderer.has_template and self.tokenizer.answer_start_id is not None:
            return as_source(self.tokenizer, self.renderer.question(text, system))
        return self.tokenizer.encode_source(text)

    def cut(self, row: Row, start: int, stop: int) -> Row:
        """The row with the tokens from start to stop-1. Tokens are counted through the source, then through the
        answer."""
        source, answer = row.parts["source"], row.parts["answer"]
        left = slice(max(start - len(source), 0), max(stop - len(source), 0) + 1)
        parts = {**row.parts, "source": source[start:stop], "answer": answer[left]}
        return self.make_row(parts, row.origin, row.number)

    def fill(self, rows: Iterator[Row], size: int, part: int) -> list[Row]:
        """A row of this size. Nearly all its tokens are in the source if `part` is 0, or in the answer if `part` is
        1."""
        some = fill_with(rows, size, self)
        ids = np.concatenate([row.parts[name] for row in some for name in ("source", "answer")])
        source = size - 1 if part == 0 else 1
        filled = np.resize(ids, size + 1)
        return [self.make_row(source_parts(filled[:source], filled[source:]), some[0].origin, some[0].number)]

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Make the batch. Sources and answers are padded separately. Answers need no mask, because padding comes last.

        Shapes: input_ids, attention_mask (B, S); decoder_input_ids, labels (B, A), where position a predicts labels[a];
        weights (B, A) if a weight is not 1.
        """
        rows = [row for (row,) in sequences]
        pad, answers = self.tokenizer.pad_id, [row.parts["answer"] for row in rows]
        inputs = {
            "input_ids": lay_end_to_end([[row.parts["source"]] for row in rows], pad),
            "attention_mask": real_positions([row.sizes[0] for row in rows]).long(),
            "decoder_input_ids": lay_end_to_end([[answer[:-1]] for answer in answers], pad),
        }
        targets = {"labels": lay_end_to_end([[answer[1:]] for answer in answers], IGNORED)}
        weights = torch.tensor([float(row.parts["weight"][0]) for row in rows])  # (B,)
        if not (weights == 1).all():
            targets["weights"] = weights[:, None].expand_as(targets["labels"])
        return Batch(inputs, targets, tuple(map(tuple, sequences)))

    def spans(self, row: Row) -> list[Span]:
        """The source, and the answer."""
        source, answer = row.parts["source"], row.parts["answer"]
        weight = float(row.parts["weight"][0])
        title = "" if weight == 1 else f"weight of the loss: {weight:.6g}"
        return [Span(source, np.zeros(len(source), np.bool_)), Span(answer, np.arange(len(answer)) > 0, title)]

    def choosing(self, shape: tuple[int, int], dtype: torch.dtype) -> tuple[RowKind, LossKind]:
        """Rows with one decoder sequence for each answer, and the loss that scores the answers."""
        return LineByLineRows(self.tokenizer), ChoiceLoss(shape)


def answer_weight(example: ChatExample | CompletionExample) -> float:
    """The weight of an example's last answer."""
    if isinstance(example, ChatExample) and (index := last_answer(example)) is not None:
        return example.weight * example.messages[index].weight
    return example.weight


def source_parts(source: Array, answer: Array, weight: float = 1.0) -> dict[str, Array]:
    """The arrays (parts) of a row, by name. Shapes: source (S,), answer (A + 1,)."""
    return {"source": source, "answer": answer, "weight": np.array([weight], np.float32)}
