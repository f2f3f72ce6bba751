"""Supervised fine-tuning: next-token cross entropy on the supervised tokens of causal models.

Comes in: examples, then a Batch and the model's output.  Goes out: rows, then Loss (sum over supervised tokens).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunekit.contracts import IGNORED, Batch, Loss, ModelOutput, Part, Row, RowLayout, Sums, Tokenizer
from tunekit.data.batching.pad import lay_end_to_end, positions
from tunekit.data.encoding.encode import EncodeOptions
from tunekit.objectives.logprobs import loss_of_positions, sums_of_positions, supervised_positions
from tunekit.objectives.rows import TextEncoder, TextObjective, fill_with
from tunekit.recipe.objectives.sft import SftSettings

Array = NDArray[Any]
UNWEIGHTED = np.empty(0, np.float32)


class SftEncoder(TextEncoder):
    """A row is one sequence of ids, with a mark on each that is trained on; `weights` of all of them where one differs
    from 1, else of none."""

    def __init__(self, tokenizer: Tokenizer, options: EncodeOptions) -> None:
        super().__init__(tokenizer, options)
        self.each = options.rewritten_answers == "each"

    def examples(self, example: Any) -> Sequence[Any]:
        """Where it is asked for, each answer of a conversation with the turns before it, as it was given."""
        return self.renderer.as_given(example) if self.each else [example]

    def encode(self, example: Any, origin: str) -> Row:
        """The row. Raises: Dropped where nothing can be trained on; DataError where the row is wrong."""
        ids, weights = self.renderer.sequence(example)
        return make_row(np.asarray(ids, dtype=np.int32), weights > 0, origin, weights=weights)


def make_row(ids: Array, trained: Array, origin: str, number: int = 0, weights: Array = UNWEIGHTED) -> Row:
    """A row of (T,) ids, marks and weights; token 0 is never predicted, so it never counts."""
    weights = UNWEIGHTED if (weights[trained[: len(weights)]] == 1).all() else weights
    parts = {"ids": ids, "trained": trained, "weights": weights}
    return Row(parts, (len(ids),), int(trained[1:].sum()), origin, number)


class Sft(TextObjective):
    """loss = sum over supervised tokens of -w log p(token | tokens before it); divided by the sum of the step's w.

    w is 1, or what the row says: `weight` of a message times `sample_weight` of the row.
    """

    packable = True
    layout = RowLayout({"ids": "<i4", "trained": "?", "weights": "<f4"}, ("ids",), sizes=1)

    def row_encoder(self, options: EncodeOptions) -> SftEncoder:
        """Rows as the chat template, or the format, lays them out."""
        return SftEncoder(self.tokenizer, options)

    def cut(self, row: Row, start: int, stop: int) -> Row:
        """Tokens start .. stop-1."""
        ids, trained, weights = (row.parts[name][start:stop] for name in ("ids", "trained", "weights"))
        return make_row(ids, trained, row.origin, row.number, weights)

    def fill(self, rows: Iterator[Row], size: int, part: int) -> list[Row]:
        """Rows end to end."""
        return fill_with(rows, size, self)

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Position ids restart at 0 for each row; no mask: padding comes last, and a causal model never looks ahead.

        Shapes: input_ids, position_ids, labels, and weights if any is not 1, (B, T); a row's first token is nobody's
        label.
        """
        ids = lay_end_to_end([[row.parts["ids"] for row in rows] for rows in sequences], self.tokenizer.pad_id)
        labels = lay_end_to_end([[_labels(row) for row in rows] for rows in sequences], IGNORED)
        places = positions([[row.size for row in rows] for rows in sequences])
        targets = {"labels": labels}
        if any(len(row.parts["weights"]) for rows in sequences for row in rows):
            targets["weights"] = lay_end_to_end([[_weights(row) for row in rows] for rows in sequences], 0, np.float32)
        return Batch({"input_ids": ids, "position_ids": places}, targets, tuple(map(tuple, sequences)))

    def spans(self, row: Row) -> list[Part]:
        """The sequence, under how much its tokens count where that is not 1; its first token is never predicted."""
        marked, weights = _labels(row) != IGNORED, row.parts["weights"]  # (T,); (T,) or (0,)
        return [Part(row.parts["ids"], marked, weights_title(weights[marked[: len(weights)]]))]

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """Shapes: output.hidden (B, T, D) -> total (1,)."""
        return loss_of_positions(output, *supervised(batch))

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """loss, correct and units, over tokens."""
        return sums_of_positions(output, *supervised(batch), batch)

    def units(self, batch: Batch) -> Tensor:
        """(1,) float64: supervised tokens, each as often as it counts."""
        weights = supervised(batch)[2] if "weights" in batch.targets else None
        return super().units(batch) if weights is None else weights.sum(dtype=torch.float64)[None]


def supervised(batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """(N,) indices of the positions that predict a supervised token, those tokens, and their weights if any is not
    1."""
    index, targets = supervised_positions(batch.targets["labels"])
    weights = batch.targets.get("weights")
    return index, targets, None if weights is None else weights.flatten()[index + 1]


def weights_title(weights: Array) -> str:
    """What is said of the weights of trained tokens that are not all 1."""
    if (weights == 1).all():
        return ""
    counted = zip(*np.unique(weights, return_counts=True), strict=True)
    return "weight of the loss: " + ", ".join(f"{weight:.6g} of {count:,} tokens" for weight, count in counted)


def _weights(row: Row) -> Array:
    """(T,) of each token."""
    weights = row.parts["weights"]
    return weights if len(weights) else np.ones(row.size, np.float32)


def _labels(row: Row) -> np.ndarray[Any, Any]:
    """(T,) the ids that are trained on, IGNORED elsewhere."""
    labels = np.where(row.parts["trained"], row.parts["ids"], IGNORED)
    labels[:1] = IGNORED
    return labels


def make(settings: SftSettings, processor: Tokenizer, facts: Mapping[str, Any]) -> Sft:
    """The objective of `objective: sft`."""
    return Sft(settings, processor)
