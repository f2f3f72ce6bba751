"""Answers to choose from, each scored by its log-probability after one prompt that they share.

A causal model reads the prompt once, with the answers side by side after it: each sees the prompt and itself. The
encoder of an encoder-decoder reads it once, and the decoder has a line for each answer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from tunekit.contracts import Array, Batch, Row, RowKind, Tensors, Tokenizer
from tunekit.data.batching.pad import lay_end_to_end, real_positions
from tunekit.model.attention.documents import as_bias


class Answer(NamedTuple):
    """Ids of one answer from where it parts from the others, and which of them are scored."""

    ids: tuple[int, ...]
    scored: tuple[bool, ...]


@dataclass(frozen=True)
class Question:
    """A prompt, and all answers to choose from; `right`: the number of the row's own answer, if there is one."""

    prompt: Array  # (P,) ids
    answers: tuple[Answer, ...]
    origin: str
    right: int = 0

    @cached_property
    def longest(self) -> int:
        """Tokens of the prompt with its longest answer."""
        return len(self.prompt) + max(len(answer.ids) for answer in self.answers)

    @property
    def scored(self) -> list[int]:
        """Number of scored tokens of each answer."""
        return [sum(answer.scored) for answer in self.answers]


def make_question(rows: Sequence[Row], right: int = 0) -> Question:
    """The question of rows that differ only in their answers: what they share up to the first trained token is the
    prompt, the rest are the answers."""
    if "source" in rows[0].parts:
        ends = [row.parts["answer"] for row in rows]
        answers = [Answer(tuple(ids.tolist()), (False, *[True] * (len(ids) - 1))) for ids in ends]
        return Question(rows[0].parts["source"], tuple(answers), rows[0].origin, right)
    trained = [np.flatnonzero(row.parts["trained"]) for row in rows]  # (S,) each
    start = min(int(places[0]) for places in trained)
    least = min(len(row.parts["ids"]) for row in rows)
    heads = np.stack([row.parts["ids"][:least] for row in rows])  # (answers, least)
    differ = np.flatnonzero((heads != heads[0]).any(axis=0))
    start = min(start, *differ[:1].tolist(), least)
    answers = []
    for row, places in zip(rows, trained, strict=True):
        part = slice(start, int(places[-1]) + 1)
        answers.append(Answer(tuple(row.parts["ids"][part].tolist()), tuple(row.parts["trained"][part].tolist())))
    return Question(rows[0].parts["ids"][:start], tuple(answers), rows[0].origin, right)


def split_question(question: Question, number: int, most: int, *, apart: bool) -> Iterator[Row]:
    """Rows of the question's answers, as many in each as `most` positions hold; `apart`: each has its own prompt."""
    prompt, sizes = len(question.prompt), [len(answer.ids) for answer in question.answers]
    held: list[int] = []
    for at, size in enumerate(sizes):
        widest = max(size, *(sizes[each] for each in held), 0)
        apiece = (len(held) + 1) * (prompt + widest)
        if held and (apiece if apart else prompt + sum(sizes[each] for each in held) + size) > most:
            yield _row(question, number, held, apart)
            held = []
        held.append(at)
    yield _row(question, number, held, apart)


def _row(question: Question, number: int, held: Sequence[int], apart: bool) -> Row:
    """`cells`: in (questions, answers), flattened, that of each answer."""
    answers = [question.answers[at] for at in held]
    lengths, prompt = [len(answer.ids) for answer in answers], len(question.prompt)
    parts = {
        "prompt": question.prompt,
        "answers": np.concatenate([answer.ids for answer in answers]),
        "scored": np.concatenate([answer.scored for answer in answers]),
        "lengths": np.array(lengths),
        "cells": number * len(question.answers) + np.array(held),
    }
    size = len(held) * (prompt + max(lengths)) if apart else prompt + sum(lengths)
    return Row(parts, (size,), int(parts["scored"].sum()), question.origin, number)


@dataclass(frozen=True, eq=False)
class SideBySideRows(RowKind):
    """Answers side by side behind their prompt, for causal models. `dtype`: of the attention mask, the base's."""

    tokenizer: Tokenizer
    dtype: torch.dtype

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Position ids go on from the prompt's end in each answer. Where a row has several, a mask keeps them apart.

        Shapes: input_ids, position_ids (B, T), attention_mask (B, 1, T, T); index, labels, cells (S,).
        """
        rows = [row for (row,) in sequences]
        ids = lay_end_to_end([[row.parts["prompt"], row.parts["answers"]] for row in rows], self.tokenizer.pad_id)
        width = ids.shape[1]
        branches, places = torch.full(ids.shape, -1), torch.zeros_like(ids)  # (B, T) each
        index, labels, cells = [], [], []
        for line, row in enumerate(rows):
            prompt, lengths, scored = len(row.parts["prompt"]), row.parts["lengths"], row.parts["scored"]
            firsts = np.cumsum(lengths) - lengths  # (n,)
            branch = np.repeat(np.arange(len(lengths)), lengths)  # (A,)
            within = np.arange(len(branch)) - firsts[branch]  # (A,)
            before = np.where(within == 0, prompt - 1, prompt + np.arange(len(branch)) - 1)  # (A,)
            answered = slice(prompt, prompt + len(branch))
            branches[line, :prompt], branches[line, answered] = 0, torch.from_numpy(branch + 1)
            places[line, :prompt], places[line, answered] = torch.arange(prompt), torch.from_numpy(prompt + within)
            places[line, answered.stop :] = torch.arange(width - answered.stop)
            index.append(line * width + before[scored])
            labels.append(row.parts["answers"][scored])
            cells.append(row.parts["cells"][branch[scored]])
        inputs = {"input_ids": ids, "position_ids": places}
        if any(len(row.parts["lengths"]) > 1 for row in rows):
            seen = (branches[:, None] == branches[:, :, None]) | (branches[:, None] == 0)  # (B, T, T)
            inputs["attention_mask"] = as_bias(seen.tril()[:, None], self.dtype)
        return Batch(inputs, _targets(index, labels, cells), tuple(map(tuple, sequences)))


@dataclass(frozen=True, eq=False)
class LineByLineRows(RowKind):
    """A line of the decoder for each answer, for encoder-decoders."""

    tokenizer: Tokenizer

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Shapes: input_ids, attention_mask (B, S); decoder_input_ids (N, A), source_rows (N,): which source each of
        them answers; index, labels, cells (S,)."""
        rows = [row for (row,) in sequences]
        pad = self.tokenizer.pad_id
        sources = [row.parts["prompt"] for row in rows]
        answers, scored = (
            [part for row in rows for part in np.split(row.parts[name], np.cumsum(row.parts["lengths"])[:-1])]
            for name in ("answers", "scored")
        )
        counts = [len(row.parts["lengths"]) for row in rows]
        laid = lay_end_to_end([[answer[:-1]] for answer in answers], pad)
        inputs = {
            "input_ids": lay_end_to_end([[source] for source in sources], pad),
            "attention_mask": real_positions([len(source) for source in sources]).long(),
            "decoder_input_ids": laid,
        }
        if len(answers) > len(rows):
            inputs["source_rows"] = torch.repeat_interleave(torch.tensor(counts))
        places = [np.flatnonzero(each[1:]) for each in scored]
        index = [line * laid.shape[1] + each for line, each in enumerate(places)]
        labels = [answer[1:][each] for answer, each in zip(answers, places, strict=True)]
        numbers = np.concatenate([row.parts["cells"] for row in rows]).tolist()
        cells = [np.full(len(each), number) for each, number in zip(places, numbers, strict=True)]
        return Batch(inputs, _targets(index, labels, cells), tuple(map(tuple, sequences)))


def _targets(*parts: Sequence[Array]) -> Tensors:
    names = ("index", "labels", "cells")
    return {name: torch.from_numpy(np.concatenate(part)) for name, part in zip(names, parts, strict=True)}
