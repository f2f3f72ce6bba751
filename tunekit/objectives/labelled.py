"""What objectives share whose head has one score a label: the labels, the base with its head, rows of one text.

Comes in: settings, a processor, and labels where they are known.  Goes out: LabelObjective, or LabelTextObjective over
texts, which an objective's file makes whole.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tunekit.contracts import GREEDY, Batch, Loss, ModelOutput, Objective, Row, Rows, Sampling, Sums, Tokenizer
from tunekit.data.batching.pad import lay_end_to_end, positions, real_positions
from tunekit.data.encoding.encode import EncodeOptions
from tunekit.errors import DataError, InputError, Problem, RecipeError
from tunekit.files.cache_folder import hash_of
from tunekit.machine.devices import summing_dtype
from tunekit.model.text.generation import check_prompts
from tunekit.objectives.losses.confusion import label_sums
from tunekit.objectives.losses.logprobs import row_losses
from tunekit.objectives.rows import RowObjective, put_around
from tunekit.recipe.bases.label_settings import LabelSettings
from tunekit.recipe.model import HeadedModel, ModelSection

EMPTY_TEXT = "empty text"
Kind = TypeVar("Kind", bound="LabelObjective")


class LabelObjective(RowObjective):
    """loss = sum over labels of -log p(label | row); divided by the step's number of labels."""

    pad_id: int | None = None  # of a base whose configuration names no padding
    whole = "text"  # what has a label, or several

    def __init__(
        self,
        settings: LabelSettings,
        processor: Any,
        labels: Sequence[str],
        head: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> None:
        """`head`: labels of the rows of the base's own head, where it has one."""
        super().__init__(settings, processor)
        self.processor = processor
        self.settings, self.labels, self.head, self.notes = settings, tuple(labels), tuple(head), notes
        self.facts = {"labels": list(labels)}
        self.complete = bool(labels)
        self.fingerprint = hash_of([self.fingerprint, *labels])  # which decide what rows are wrong

    def labels_of(self, row: Row) -> list[str]:
        """The labels of a row."""
        raise NotImplementedError

    def scores(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Tensor]:
        """(N, C) float32 scores of the batch's labels, and their (N,) numbers, on the device."""
        raise NotImplementedError

    def section(self, model: ModelSection, seed: int = 0) -> ModelSection:
        """The base with a head of one score a label: its own where that is for these labels."""
        new = bool(self.head) and self.head != self.labels
        head = {"new_head": new, "labels": self.labels, "head_seed": seed, "head_pad_id": self.pad_id}
        return HeadedModel.of(model, family=self.family, **head)

    def informed(self, rows: Sequence[Rows], template: str | None = None) -> Objective:
        """With the labels of the rows where none were given, in the order of the base's own head if it has the same.

        Raises: DataError for fewer than two, or for one that no row teaches and nothing else names.
        """
        train, held = ([some[index] for index in range(len(some))] for some in (rows[0], rows[1] if rows[1:] else ()))
        taught = Counter(label for row in train for label in set(self.labels_of(row)))
        unseen = {label: row for row in reversed(held) for label in self.labels_of(row) if label not in taught}
        found = {*taught, *unseen}
        same = self.head if set(self.head) == found else ()
        if unseen and not self.labels and not same:
            label, row = min(unseen.items(), key=lambda pair: pair[1].number)
            file, _, line = row.origin.rpartition(":")
            how = f"add rows of it there, take this one out, or list '{label}' under objective.labels"
            raise DataError(f"the label '{label}' is in no row of data.train", how, file=file, line=int(line))
        labels = self.labels or same or tuple(sorted(found, key=_by_number))
        if len(labels) < 2:
            what = f"all rows of data.train have the label '{labels[0]}'"
            raise DataError(what, "classification needs two labels or more")
        notes = [f"the label '{label}' occurs in the evaluation rows only" for label in labels if label in unseen]
        notes += [f"the label '{label}' has one row to train on" for label in labels if taught[label] == 1]
        if self.head and self.head != labels:
            notes.append(
                f"the base's own head ({shown(self.head)}) is not used, and a new one trained for {shown(labels)}; "
                "to keep it, list its labels in the order of its rows under objective.labels"
            )
        return type(self)(self.settings, self.processor, labels, self.head, notes)  # type: ignore[return-value]

    def check_options(self, options: EncodeOptions) -> None:
        """Raises: RecipeError where a long row would be split."""
        if options.excess_length == "split":
            what = f"a piece of a {self.whole} need not have the labels of the whole"
            raise RecipeError.of([Problem(what, "write truncate, drop or error", key="data.excess_length")])

    def check_label(self, label: str) -> None:
        """Raises: DataError for a label beyond those that were given."""
        if self.labels and label not in self.labels:
            what = f"the label '{label}' is not among the labels ({shown(self.labels)})"
            raise DataError(what, "mend it, or list it under objective.labels")

    def numbers(self, sequences: Sequence[Sequence[Row]]) -> Tensor:
        """(N,) the numbers of the labels of all rows, in order."""
        places = {label: number for number, label in enumerate(self.labels)}
        return torch.tensor([places[label] for rows in sequences for row in rows for label in self.labels_of(row)])

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """Shapes: output.logits (R, C) or (B, T, C), or output.hidden (B, T, D) -> total (1,)."""
        scores, labels = self.scores(output, batch)
        return Loss(torch.nn.functional.cross_entropy(scores, labels, reduction="sum")[None])

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """loss, and those of label_sums."""
        scores, labels = self.scores(output, batch)
        losses = torch.nn.functional.cross_entropy(scores, labels, reduction="none")  # (N,)
        loss = losses.sum(dtype=summing_dtype(losses.device))
        return {"loss": loss, **row_losses(losses, batch), **label_sums(scores, labels)}

    def most_likely(self, model: Any, rows: Sequence[Row], batch_size: int) -> list[str]:
        """The likeliest labels of each row, a blank between those of several."""
        found: list[str] = []
        for start in range(0, len(rows), batch_size):
            some = rows[start : start + batch_size]
            batch = self.collate([[row] for row in some])
            chosen = iter(self.scores(model.output(batch.inputs), batch)[0].argmax(dim=-1).tolist())
            found += [" ".join(self.labels[next(chosen)] for _ in range(row.supervised)) for row in some]
        return found

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """`inputs`, and where the labels of which are."""
        raise NotImplementedError


class LabelTextObjective(LabelObjective):
    """Over texts: a row's part `ids` is one with the tokenizer's special tokens around it."""

    packable = True

    @property
    def tokenizer(self) -> Tokenizer:
        """The processor: of texts there is no other."""
        found: Tokenizer = self.processor
        return found

    @property
    def pad_id(self) -> int:  # type: ignore[override]
        """The tokenizer's."""
        return self.tokenizer.pad_id

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """Special tokens before and after a text."""
        return put_around(self.tokenizer)

    @cached_property
    def padding(self) -> int:
        """The id that fills rows up, masked: none of those that end a text, for which the heads of T5 and BART look."""
        ends = self.around[1]
        ids: tuple[int, ...] = (self.tokenizer.pad_id, *range(len(ends) + 1))
        return next(each for each in ids if each not in ends)

    def sized(self, ids: Sequence[int] | np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
        """(size,) ids of a text, cut or again and again, the special tokens at its end kept there: heads look for them.

        Shapes: ids (T,).
        """
        text, end = np.split(np.asarray(ids, np.int32), [len(ids) - len(self.around[1])])
        return np.concatenate([np.resize(text, max(size - len(end), 0)), end])[:size]

    def cut_ids(self, ids: Sequence[int], options: EncodeOptions) -> list[int]:
        """Ids of a text that is asked for, cut where rows are."""
        cut = options.excess_length == "truncate" and len(ids) > options.max_length
        return self.sized(ids, options.max_length).tolist() if cut else list(ids)

    def fill(self, rows: Iterator[Row], size: int, part: int) -> list[Row]:
        """One row, its ids again and again."""
        return [self.resized(next(rows), size)]

    def cut(self, row: Row, start: int, stop: int) -> Row:
        """Its first tokens, the last of them those that end a text. Rows are never cut at their beginning."""
        return self.resized(row, min(stop, row.size))

    def resized(self, row: Row, size: int) -> Row:
        """The row with so many ids."""
        raise NotImplementedError

    def inputs(self, sequences: Sequence[Sequence[Row]]) -> dict[str, Tensor]:
        """Shapes: input_ids, position_ids (B, T), and attention_mask where there is padding."""
        ids = lay_end_to_end([[row.parts["ids"] for row in rows] for rows in sequences], self.padding)
        sizes = [[row.size for row in rows] for rows in sequences]
        inputs = {"input_ids": ids, "position_ids": positions(sizes)}
        if len(sequences) > 1:
            inputs["attention_mask"] = real_positions([sum(each) for each in sizes]).long()
        return inputs

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
        """The most likely labels of each text, a blank between those of several words.

        Raises: InputError where one should be drawn, or for an empty text; DataError for one beyond the positions.
        """
        refuse_sampling(sampling)
        if not all(prompts):
            raise InputError("a text is empty, and the tokenizer puts nothing around it", "give it words to classify")
        check_prompts(prompts, model.base.family.learned_positions(model.base.net), model.virtual_tokens)
        return self.most_likely(model, [self.asked(ids) for ids in prompts], batch_size)

    def asked(self, ids: Sequence[int]) -> Row:
        """A row of ids whose labels are not known: it has the first one."""
        raise NotImplementedError


def refuse_sampling(sampling: Sampling) -> None:
    """Raises: InputError where an answer should be drawn."""
    if sampling.temperature:
        what = "a classifier answers with the likeliest label; nothing is sampled"
        raise InputError(what, "leave --temperature out")


def make_objective_of(kind: type[Kind], settings: LabelSettings, processor: Any, facts: Mapping[str, Any]) -> Kind:
    """The objective; facts are the labels that its head was trained for, or the base's."""
    given = facts.get("labels") or settings.labels
    return kind(settings, processor, [str(label) for label in given], facts.get("head", ()))


def _by_number(label: str) -> tuple[bool, int, str]:
    """Whole numbers in their own order, before names; no two labels are equal."""
    number = re.fullmatch("-?[0-9]{1,18}", label)
    return (number is None, int(label) if number else 0, label)


def shown(labels: Sequence[str]) -> str:
    """The first labels, for a message."""
    return ", ".join(labels[:8]) + (f" and {len(labels) - 8} more" if len(labels) > 8 else "")
