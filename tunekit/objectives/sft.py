"""Supervised fine-tuning: next-token cross entropy on the supervised tokens of causal models.

Comes in: examples, then a Batch and the model's output.  Goes out: rows, then Loss (sum over supervised tokens).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tunekit.contracts import IGNORED, Batch, Loss, ModelOutput, Part, Row, RowLayout, Sums, Tokenizer
from tunekit.data.batching.pad import lay_end_to_end, positions
from tunekit.data.encoding.encode import EncodeOptions
from tunekit.objectives.logprobs import loss_of_positions, sums_of_positions, supervised_positions
from tunekit.objectives.rows import TextEncoder, TextObjective, fill_with
from tunekit.recipe.objectives.sft import SftSettings


class SftEncoder(TextEncoder):
    """A row is one sequence of ids, with a mark on each that is trained on."""

    def encode(self, example: Any, origin: str) -> Row:
        """The row. Raises: Dropped where nothing can be trained on; DataError where the row is wrong."""
        ids, trained = self.renderer.sequence(example)
        return make_row(np.asarray(ids, dtype=np.int32), trained.astype(np.bool_), origin)


def make_row(ids: np.ndarray[Any, Any], trained: np.ndarray[Any, Any], origin: str, number: int = 0) -> Row:
    """A row of (T,) ids and marks; token 0 is never predicted, so it never counts."""
    return Row({"ids": ids, "trained": trained}, (len(ids),), int(trained[1:].sum()), origin, number)


class Sft(TextObjective):
    """loss = sum over supervised tokens of -log p(token | tokens before it); divided by the step's number of them."""

    packable = True
    layout = RowLayout({"ids": "<i4", "trained": "?"}, ("ids",), sizes=1)

    def row_encoder(self, options: EncodeOptions) -> SftEncoder:
        """Rows as the chat template, or the format, lays them out."""
        return SftEncoder(self.tokenizer, options)

    def cut(self, row: Row, start: int, stop: int) -> Row:
        """Tokens start .. stop-1."""
        ids, trained = row.parts["ids"][start:stop], row.parts["trained"][start:stop]
        return make_row(ids, trained, row.origin, row.number)

    def fill(self, rows: Iterator[Row], size: int, part: int) -> list[Row]:
        """Rows end to end."""
        return fill_with(rows, size, self)

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Position ids restart at 0 for each row; no mask: padding comes last, and a causal model never looks ahead.

        Shapes: input_ids, position_ids, labels (B, T); a row's first token is nobody's label.
        """
        ids = lay_end_to_end([[row.parts["ids"] for row in rows] for rows in sequences], self.tokenizer.pad_id)
        labels = lay_end_to_end([[_labels(row) for row in rows] for rows in sequences], IGNORED)
        places = positions([[row.size for row in rows] for rows in sequences])
        return Batch({"input_ids": ids, "position_ids": places}, {"labels": labels}, tuple(map(tuple, sequences)))

    def spans(self, row: Row) -> list[Part]:
        """The sequence; its first token is never predicted."""
        return [Part(row.parts["ids"], _labels(row) != IGNORED)]

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """Shapes: output.hidden (B, T, D) -> total (1,)."""
        return loss_of_positions(output, *supervised_positions(batch.targets["labels"]))

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """loss, correct and units, over tokens."""
        return sums_of_positions(output, *supervised_positions(batch.targets["labels"]), batch)


def _labels(row: Row) -> np.ndarray[Any, Any]:
    """(T,) the ids that are trained on, IGNORED elsewhere."""
    labels = np.where(row.parts["trained"], row.parts["ids"], IGNORED)
    labels[:1] = IGNORED
    return labels


def make(settings: SftSettings, processor: Tokenizer, facts: Mapping[str, Any]) -> Sft:
    """The objective of `objective: sft`."""
    return Sft(settings, processor)
