"""Sequence classification: cross entropy on one label for each text.

Comes in: texts with labels, then a Batch and the model's output.  Goes out: rows, then Loss (sum over rows).
An encoder's head reads whole rows and gives their scores; a decoder's is called on the last token of each row, so that
rows may lie end to end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunekit.contracts import Batch, ModelOutput, Part, Row, RowLayout, Tokenizer
from tunekit.data.encoding.encode import EncodeOptions
from tunekit.data.encoding.outcomes import Dropped
from tunekit.formats.labels import LabelExample
from tunekit.machine.placing import placed
from tunekit.objectives.labelled import EMPTY_TEXT, LabelTextObjective, make_objective_of
from tunekit.objectives.rows import TextEncoder
from tunekit.recipe.objectives.classify import ClassifySettings


class ClassifyEncoder(TextEncoder):
    """A row is a text with the tokenizer's special tokens around it, and its label as UTF-8."""

    def __init__(self, objective: Classify, options: EncodeOptions) -> None:
        super().__init__(objective.tokenizer, options)
        self.objective, self.options = objective, options

    def encode(self, example: LabelExample, origin: str) -> Row:
        """The row. Raises: Dropped for an empty text; DataError for a label beyond those that were given."""
        if not example.text.strip():
            raise Dropped(EMPTY_TEXT)
        self.objective.check_label(example.label)
        ids = self.tokenizer.encode_source(example.text)
        return make_row(ids, np.frombuffer(example.label.encode(), np.uint8), origin)

    def prompt(self, example: LabelExample) -> tuple[list[int], str] | None:
        """Ids of the text, and its label."""
        return self.question(example.text), example.label

    def question(self, text: str) -> list[int]:
        """Ids of a text as the tokenizer lays it out, cut where rows are."""
        return self.objective.cut_ids(self.tokenizer.encode_source(text), self.options)


def make_row(
    ids: Sequence[int] | np.ndarray[Any, Any], label: np.ndarray[Any, Any], origin: str, number: int = 0
) -> Row:
    """A row of (T,) ids and a label; the loss counts one label a row."""
    tokens = np.asarray(ids, dtype=np.int32)
    return Row({"ids": tokens, "label": label}, (len(tokens),), 1, origin, number)


class Classify(LabelTextObjective):
    """loss = sum over rows of -log p(label | text); divided by the step's number of rows."""

    metrics: Sequence[str] = ("loss", "accuracy", "macro_f1")
    layout = RowLayout({"ids": "<i4", "label": "u1"}, ("ids",), sizes=1)

    def labels_of(self, row: Row) -> list[str]:
        return [row.parts["label"].tobytes().decode()]

    def row_encoder(self, options: EncodeOptions) -> ClassifyEncoder:
        """Raises: RecipeError where a long text would be split: each piece would be taught the label of the whole."""
        self.check_options(options)
        return ClassifyEncoder(self, options)

    def resized(self, row: Row, size: int) -> Row:
        """So many ids, with the label of the whole."""
        return make_row(self.sized(row.parts["ids"], size), row.parts["label"], row.origin, row.number)

    def asked(self, ids: Sequence[int]) -> Row:
        return make_row(ids, np.frombuffer(self.labels[0].encode(), np.uint8), "")

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Labels are those of the rows in order, and `last` is where each of them ends in the flattened positions.

        Shapes: those of inputs; labels, last (R,).
        """
        inputs = self.inputs(sequences)
        width = inputs["input_ids"].shape[1]
        ends = [
            width * line + end - 1 for line, rows in enumerate(sequences) for end in np.cumsum([r.size for r in rows])
        ]
        targets = {"labels": self.numbers(sequences), "last": torch.tensor(ends)}
        return Batch(inputs, targets, tuple(map(tuple, sequences)))

    def spans(self, row: Row) -> list[Part]:
        """The text under its label; no token of it is predicted."""
        ids = row.parts["ids"]
        return [Part(ids, np.zeros(len(ids), np.bool_), title=f"label: {self.labels_of(row)[0]}")]

    def scores(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Tensor]:
        if output.logits is not None:
            return output.logits.float(), placed(batch.targets["labels"], output.logits.device)
        assert output.hidden is not None
        assert output.head is not None
        last, labels = (placed(batch.targets[name], output.hidden.device) for name in ("last", "labels"))
        ends = output.hidden.reshape(-1, output.hidden.shape[-1]).index_select(0, last)  # (R, D)
        return output.head.logits(ends), labels


def make(settings: ClassifySettings, processor: Tokenizer, facts: Mapping[str, Any]) -> Classify:
    """The objective of `objective: classify`."""
    return make_objective_of(Classify, settings, processor, facts)
