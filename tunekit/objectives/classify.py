"""Sequence classification: cross entropy on one label for each text.

Comes in: texts with labels, then a Batch and the model's output.  Goes out: rows, then Loss (sum over rows).
An encoder's head reads whole rows and gives their scores; a decoder's is called on the last token of each row, so that
rows may lie end to end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunekit.contracts import (
    GREEDY,
    Batch,
    Loss,
    ModelOutput,
    Objective,
    Part,
    Row,
    RowLayout,
    Rows,
    Sampling,
    Sums,
    Tokenizer,
)
from tunekit.data.batching.pad import lay_end_to_end, positions, real_positions
from tunekit.data.encoding.encode import EncodeOptions
from tunekit.data.encoding.outcomes import Dropped
from tunekit.errors import DataError, InputError, Problem, RecipeError
from tunekit.files.cache_folder import hash_of
from tunekit.formats.labels import LabelExample
from tunekit.model.placing import placed
from tunekit.model.text.generation import check_prompts
from tunekit.objectives.rows import TextEncoder, TextObjective, put_around
from tunekit.recipe.model import HeadedModel, ModelSection
from tunekit.recipe.objectives.classify import ClassifySettings

EMPTY_TEXT = "empty text"


class ClassifyEncoder(TextEncoder):
    """A row is a text with the tokenizer's special tokens around it, and its label as UTF-8."""

    def __init__(self, objective: Classify, options: EncodeOptions) -> None:
        super().__init__(objective.tokenizer, options)
        self.objective, self.options = objective, options

    def encode(self, example: LabelExample, origin: str) -> Row:
        """The row. Raises: Dropped for an empty text; DataError for a label beyond those that were given."""
        if not example.text.strip():
            raise Dropped(EMPTY_TEXT)
        labels = self.objective.labels
        if labels and example.label not in labels:
            what = f"the label '{example.label}' is not among the labels ({_shown(labels)})"
            raise DataError(what, "mend it, or list it under objective.labels")
        ids = self.tokenizer.encode_source(example.text)
        return make_row(ids, np.frombuffer(example.label.encode(), np.uint8), origin)

    def prompt(self, example: LabelExample) -> tuple[list[int], str] | None:
        """Ids of the text, and its label."""
        return self.question(example.text), example.label

    def question(self, text: str) -> list[int]:
        """Ids of a text as the tokenizer lays it out, cut where rows are."""
        ids, most = self.tokenizer.encode_source(text), self.options.max_length
        cut = self.options.excess_length == "truncate" and len(ids) > most
        return self.objective.sized(ids, most).tolist() if cut else ids


def make_row(
    ids: Sequence[int] | np.ndarray[Any, Any], label: np.ndarray[Any, Any], origin: str, number: int = 0
) -> Row:
    """A row of (T,) ids and a label; the loss counts one label a row."""
    tokens = np.asarray(ids, dtype=np.int32)
    return Row({"ids": tokens, "label": label}, (len(tokens),), 1, origin, number)


def label_of(row: Row) -> str:
    """The label of a row as text."""
    return row.parts["label"].tobytes().decode()


class Classify(TextObjective):
    """loss = sum over rows of -log p(label | text); divided by the step's number of rows."""

    packable = True
    metrics: Sequence[str] = ("loss", "accuracy", "macro_f1")
    layout = RowLayout({"ids": "<i4", "label": "u1"}, ("ids",), sizes=1)

    def __init__(
        self,
        settings: ClassifySettings,
        tokenizer: Tokenizer,
        labels: Sequence[str],
        head: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> None:
        """`head`: labels of the rows of the base's own head, where it has one."""
        super().__init__(settings, tokenizer)
        self.settings, self.labels, self.head, self.notes = settings, tuple(labels), tuple(head), notes
        self.facts = {"labels": list(labels)}
        self.complete = bool(labels)
        self.fingerprint = hash_of([self.fingerprint, *labels])  # which decide what rows are wrong

    @cached_property
    def ending(self) -> int:
        """Special tokens at the end of a text."""
        return len(put_around(self.tokenizer)[1])

    def section(self, model: ModelSection, seed: int = 0) -> ModelSection:
        """The base with a head of one score a label: its own where that is for these labels."""
        new = bool(self.head) and self.head != self.labels
        head = {"new_head": new, "labels": self.labels, "head_seed": seed, "head_pad_id": self.tokenizer.pad_id}
        return HeadedModel.of(model, family=self.family, **head)

    def informed(self, rows: Sequence[Rows]) -> Objective:
        """With the labels of the rows where none were given, in the order of the base's own head if it has the same.

        Raises: DataError for fewer than two.
        """
        found = {label_of(some[index]) for some in rows for index in range(len(some))}
        same = self.head if set(self.head) == found else ()
        labels = self.labels or same or tuple(sorted(found, key=_by_number))
        if len(labels) < 2:
            what = f"all rows of data.train have the label '{labels[0]}'"
            raise DataError(what, "classification needs two labels or more")
        first = {label_of(rows[0][index]) for index in range(len(rows[0]))}
        notes = [
            f"the label '{label}' occurs in the evaluation rows only" for label in labels if label in found - first
        ]
        if self.head and self.head != labels:
            notes.append(
                f"the base's own head ({_shown(self.head)}) is not used, and a new one trained for {_shown(labels)}; "
                "to keep it, list its labels in the order of its rows under objective.labels"
            )
        return Classify(self.settings, self.tokenizer, labels, self.head, notes)

    def row_encoder(self, options: EncodeOptions) -> ClassifyEncoder:
        """Raises: RecipeError where a long text would be split: each piece would be taught the label of the whole."""
        if options.excess_length == "split":
            what = "a piece of a text need not have the label of the whole"
            raise RecipeError.of([Problem(what, "write truncate, drop or error", key="data.excess_length")])
        return ClassifyEncoder(self, options)

    def cut(self, row: Row, start: int, stop: int) -> Row:
        """Tokens start .. stop-1, the last of them those that end a text, with the label of the whole."""
        ids = self.sized(row.parts["ids"][start:], min(stop, row.size) - start)
        return make_row(ids, row.parts["label"], row.origin, row.number)

    def sized(self, ids: Sequence[int] | np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
        """(size,) ids of a text, cut or again and again, the special tokens at its end kept there: heads look for them.

        Shapes: ids (T,).
        """
        text, end = np.split(np.asarray(ids, np.int32), [len(ids) - self.ending])
        return np.concatenate([np.resize(text, max(size - len(end), 0)), end])[:size]

    def fill(self, rows: Iterator[Row], size: int, part: int) -> list[Row]:
        """One row, its ids again and again."""
        row = next(rows)
        return [make_row(self.sized(row.parts["ids"], size), row.parts["label"], row.origin, row.number)]

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Labels are those of the rows in order, and `last` is where each of them ends in the flattened positions.

        Shapes: input_ids, position_ids (B, T), and attention_mask where there is padding; labels, last (R,).
        """
        ids = lay_end_to_end([[row.parts["ids"] for row in rows] for rows in sequences], self.tokenizer.pad_id)
        sizes = [[row.size for row in rows] for rows in sequences]
        inputs = {"input_ids": ids, "position_ids": positions(sizes)}
        if len(sequences) > 1:
            inputs["attention_mask"] = real_positions([sum(each) for each in sizes]).long()
        ends = [ids.shape[1] * line + end - 1 for line, each in enumerate(sizes) for end in np.cumsum(each).tolist()]
        numbers = [self.labels.index(label_of(row)) for rows in sequences for row in rows]
        targets = {"labels": torch.tensor(numbers), "last": torch.tensor(ends)}
        return Batch(inputs, targets, tuple(map(tuple, sequences)))

    def spans(self, row: Row) -> list[Part]:
        """The text under its label; no token of it is predicted."""
        ids = row.parts["ids"]
        return [Part(ids, np.zeros(len(ids), np.bool_), title=f"label: {label_of(row)}")]

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """Shapes: output.logits (R, C), or output.hidden (B, T, D) -> total (1,)."""
        scores, labels = _scores(output, batch)
        return Loss(torch.nn.functional.cross_entropy(scores, labels, reduction="sum")[None])

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """loss, correct, units, and confusion (C, C): rows are true labels, columns predicted ones."""
        scores, labels = _scores(output, batch)
        losses = torch.nn.functional.cross_entropy(scores, labels, reduction="none")  # (R,)
        count = len(self.labels)
        true, predicted = (
            torch.nn.functional.one_hot(each, count).double() for each in (labels, scores.argmax(dim=-1))
        )
        confusion = true.T @ predicted  # (C, C)
        units = torch.tensor(float(len(labels)), dtype=torch.float64)
        totals = {"loss": losses.sum(dtype=torch.float64), "correct": confusion.trace(), "units": units}
        return {**totals, "confusion": confusion}

    def answer(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        batch_size: int,
        template: str | None = None,
        sampling: Sampling = GREEDY,
    ) -> list[str]:
        """The most likely label of each text.

        Raises: InputError where one should be drawn, or for an empty text; DataError for one beyond the positions.
        """
        if sampling.temperature:
            raise InputError(
                "a classifier answers with the likeliest label; nothing is sampled", "leave --temperature out"
            )
        if not all(prompts):
            raise InputError("a text is empty, and the tokenizer puts nothing around it", "give it words to classify")
        check_prompts(prompts, model.base.family.learned_positions(model.base.net), model.virtual_tokens)
        unknown = np.frombuffer(self.labels[0].encode(), np.uint8)
        rows = [make_row(ids, unknown, "") for ids in prompts]
        found: list[str] = []
        for start in range(0, len(rows), batch_size):
            batch = self.collate([[row] for row in rows[start : start + batch_size]])
            scores, _ = _scores(model.output(batch.inputs), batch)
            found += [self.labels[number] for number in scores.argmax(dim=-1).tolist()]
        return found


def _scores(output: ModelOutput, batch: Batch) -> tuple[Tensor, Tensor]:
    """(R, C) float32 scores of the batch's rows, and their (R,) labels, on the device."""
    if output.logits is not None:
        return output.logits.float(), placed(batch.targets["labels"], output.logits.device)
    assert output.hidden is not None
    assert output.head is not None
    last, labels = (placed(batch.targets[name], output.hidden.device) for name in ("last", "labels"))
    ends = output.hidden.reshape(-1, output.hidden.shape[-1]).index_select(0, last)  # (R, D)
    return output.head.logits(ends), labels


def _by_number(label: str) -> tuple[bool, int, str]:
    """Whole numbers in their own order, before names; no two labels are equal."""
    number = re.fullmatch("-?[0-9]{1,18}", label)
    return (number is None, int(label) if number else 0, label)


def _shown(labels: Sequence[str]) -> str:
    """The first labels, for a message."""
    return ", ".join(labels[:8]) + (f" and {len(labels) - 8} more" if len(labels) > 8 else "")


def make(settings: ClassifySettings, processor: Tokenizer, facts: Mapping[str, Any]) -> Classify:
    """The objective of `objective: classify`; facts are the labels that its head was trained for, or the base's."""
    given = facts.get("labels") or settings.labels
    return Classify(settings, processor, [str(label) for label in given], facts.get("head", ()))
