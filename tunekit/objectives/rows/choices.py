"""Rows for multiple choice: each possible answer to a question is scored by its log-probability.

A causal model reads the prompt once, followed by all answers; with a mask, each answer sees only the prompt and itself.
In an encoder-decoder, the encoder reads the prompt once, and the decoder reads one sequence for each answer.
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
    """The ids of an answer, and marks of the ids whose log-probabilities count. The ids start at the first position
    where the answers of a question differ."""

    ids: tuple[int, ...]
    scored: tuple[bool, ...]


@dataclass(frozen=True)
class Question:
    """A prompt, and the possible answers to it. `right`: the index of the reference answer; 0 if there is none."""

    prompt: Array  # (P,) ids
    answers: tuple[Answer, ...]
    origin: str
    right: int = 0

    @cached_property
    def longest(self) -> int:
        """The number of tokens of the prompt together with its longest answer."""
        return len(self.prompt) + max(len(answer.ids) for answer in self.answers)

    @property
    def scored(self) -> list[int]:
        """The number of scored tokens in each answer."""
        return [sum(answer.scored) for answer in self.answers]


def make_question(rows: Sequence[Row], right: int = 0) -> Question:
    """Make a question from rows that differ only in their answers. The prompt is the rows' common beginning, up to the
    first trained token at most. All later ids belong to the answers."""
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
    """Distribute the question's answers over rows. A row gets as many answers as fit into `most` positions. `apart`:
    whether the prompt is repeated for each answer."""
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
    """A row with some answers of a question. Its part `cells` contains each answer's index in the flattened scores
    (questions, answers)."""
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
    """Rows for causal models: one prompt, followed by all answers. `dtype`: the base's dtype, for the attention
    mask."""

    tokenizer: Tokenizer
    dtype: torch.dtype

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Make the batch. The position ids of each answer continue the position ids of the prompt. An answer's last
        token is predicted, but not an input. If a row has several answers, a mask separates them.

        Shapes: input_ids, position_ids (B, T), attention_mask (B, 1, T, T); index, labels, cells (S,).
        """
        rows = [row for (row,) in sequences]
        read = [np.delete(row.parts["answers"], np.cumsum(row.parts["lengths"]) - 1) for row in rows]  # (A - n,) each
        texts = [[row.parts["prompt"], answers] for row, answers in zip(rows, read, strict=True)]
        ids = lay_end_to_end(texts, self.tokenizer.pad_id)
        width = ids.shape[1]
        branches, places = torch.full(ids.shape, -1), torch.zeros_like(ids)  # (B, T) each
        index, labels, cells = [], [], []
        for line, row in enumerate(rows):
            prompt, lengths, scored = len(row.parts["prompt"]), row.parts["lengths"], row.parts["scored"]
            (branch, within), (of_read, within_read) = _places(lengths), _places(lengths - 1)  # (A,), (A - n,)
            before = np.where(within == 0, prompt - 1, prompt + np.arange(len(branch)) - branch - 1)  # (A,)
            answered = slice(prompt, prompt + len(of_read))
            branches[line, :prompt], branches[line, answered] = 0, torch.from_numpy(of_read + 1)
            places[line, :prompt], places[line, answered] = torch.arange(prompt), torch.from_numpy(prompt + within_read)
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
    """Rows for encoder-decoders, with one decoder sequence for each answer."""

    tokenizer: Tokenizer

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Make the batch. `source_rows`: the index of each answer's source.

        Shapes: input_ids, attention_mask (B, S); decoder_input_ids (N, A), source_rows (N,); index, labels, cells (S,).
        """
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


def _places(lengths: Array) -> tuple[Array, Array]:
    """For each token of concatenated answers: the number of the token's answer, and its index in this answer.
    Shapes: (n,) -> (A,) each."""
    branch = np.repeat(np.arange(len(lengths)), lengths)
    return branch, np.arange(len(branch)) - (np.cumsum(lengths) - lengths)[branch]


def _targets(*parts: Sequence[Array]) -> Tensors:
    names = ("index", "labels", "cells")
    return {name: torch.from_numpy(np.concatenate(part)) for name, part in zip(names, parts, strict=True)}
