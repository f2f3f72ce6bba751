"""Rows for causal models: each row is one sequence of ids, with a mark on each id that is trained on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tunekit.contracts import IGNORED, Array, Batch, LossKind, Row, RowKind, RowLayout, RowParts, Span
from tunekit.data.batching.pad import lay_end_to_end, positions
from tunekit.formats.example import Example
from tunekit.objectives.losses.choices import ChoiceLoss
from tunekit.objectives.rows.choices import SideBySideRows
from tunekit.objectives.rows.text import TextRows, fill_with

TOKEN_PARTS = {"ids": "<i4", "trained": "?", "weights": "<f4"}
UNWEIGHTED = np.empty(0, np.float32)


@dataclass(frozen=True, eq=False)
class SequenceRows(TextRows):
    """Rows for causal models. Parts: `ids` (T,); `trained` (T,), whether each id is trained on; `weights` (T,), empty
    if all trained tokens have weight 1. Token 0 is never predicted, so it is never trained on."""

    example = "text"
    has_choices = True
    has_reasoning = True
    packable = True
    layout = RowLayout(TOKEN_PARTS, ("ids",), sizes=1)

    def examples(self, example: Example) -> Sequence[Example]:
        """The example itself. With `data.rewritten_answers: each`, one example for each answer of a conversation, after
        the original turns."""
        return self.renderer.as_given(example) if self.options.rewritten_answers == "each" else [example]

    def encode(self, example: Example, origin: str) -> Row:
        """The row of an example. Raises: Dropped if nothing can be trained on; DataError if the example is wrong."""
        ids, weights = self.renderer.sequence(example)
        return self.make_row(sequence_parts(np.asarray(ids, dtype=np.int32), weights > 0, weights), origin)

    def sizes_of(self, parts: RowParts) -> tuple[int, ...]:
        return (len(parts["ids"]),)

    def units_in(self, parts: RowParts) -> int:
        return int(parts["trained"][1:].sum())

    def cut(self, row: Row, start: int, stop: int) -> Row:
        """The row with the tokens from start to stop-1."""
        parts = (row.parts[name][start:stop] for name in TOKEN_PARTS)
        return self.make_row(sequence_parts(*parts), row.origin, row.number)

    def fill(self, rows: Iterator[Row], size: int, part: int) -> list[Row]:
        """Rows whose sizes sum to this size, to be packed together."""
        return fill_with(rows, size, self)

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Make the batch. Position ids restart at 0 for each row. No mask is needed: padding comes last, and a causal
        model does not read later tokens.

        Shapes: input_ids, position_ids, labels (B, T); weights (B, T) if a weight is not 1. A row's first token is
        never a label. Values that a step added to the rows become targets (N, ...), where N is the number of supervised
        tokens in all rows.
        """
        rows = [row for sequence in sequences for row in sequence]
        targets = {"labels": lay_end_to_end([[labels_of_tokens(row) for row in some] for some in sequences], IGNORED)}
        if any(len(row.parts["weights"]) for row in rows):
            weights = [[_weights(row) for row in some] for some in sequences]
            targets["weights"] = lay_end_to_end(weights, 0, np.float32)
        for name in [name for name in rows[0].parts if name not in self.layout.parts]:
            targets[name] = torch.from_numpy(np.concatenate([row.parts[name] for row in rows]))
        inputs = {
            "input_ids": lay_end_to_end(
                [[row.parts["ids"] for row in some] for some in sequences], self.tokenizer.pad_id
            ),
            "position_ids": positions([[row.size for row in some] for some in sequences]),
        }
        return Batch(inputs, targets, tuple(map(tuple, sequences)))

    def spans(self, row: Row) -> list[Span]:
        """The sequence, for preview. The title states the weights if a trained token has a weight other than 1."""
        marked, weights = labels_of_tokens(row) != IGNORED, row.parts["weights"]  # (T,); (T,) or (0,)
        return [Span(row.parts["ids"], marked, weights_title(weights[marked[: len(weights)]]))]

    def choosing(self, shape: tuple[int, int], dtype: torch.dtype) -> tuple[RowKind, LossKind]:
        """Rows in which all possible answers follow one prompt, and the loss that scores the answers."""
        return SideBySideRows(self.tokenizer, dtype), ChoiceLoss(shape)


def weights_title(weights: Array) -> str:
    """A title that states each weight and the number of trained tokens with this weight; empty if all weights are 1."""
    if (weights == 1).all():
        return ""
    counted = zip(*np.unique(weights, return_counts=True), strict=True)
    return "weight of the loss: " + ", ".join(f"{weight:.6g} of {count:,} tokens" for weight, count in counted)


def sequence_parts(ids: Array, trained: Array, weights: Array = UNWEIGHTED) -> dict[str, Array]:
    """The arrays (parts) of a row, by name. Shapes: (T,) each. Empty `weights` mean that all weights are 1."""
    weights = UNWEIGHTED if (weights[trained[: len(weights)]] == 1).all() else weights
    return {"ids": ids, "trained": trained, "weights": weights}


def _weights(row: Row) -> Array:
    """(T,) the weight of each token."""
    weights = row.parts["weights"]
    return weights if len(weights) else np.ones(row.size, np.float32)


def labels_of_tokens(row: Row) -> Array:
    """The id at each position that is trained on, IGNORED at other positions; shape (T,)."""
    labels = np.where(row.parts["trained"], row.parts["ids"], IGNORED)
    labels[:1] = IGNORED
    return labels
