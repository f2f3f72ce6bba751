"""Supervised fine-tuning of encoder-decoders: cross entropy on the answer, given what the encoder read.

Comes in: examples, then a Batch and the decoder's last hidden states.  Goes out: rows of a source and an answer, then
Loss (sum over the answers' tokens).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunekit.contracts import IGNORED, Batch, Loss, ModelOutput, Part, Row, RowLayout, Sums, Tokenizer
from tunekit.data.batching.pad import lay_end_to_end, real_positions
from tunekit.data.encoding.encode import EncodeOptions
from tunekit.data.encoding.outcomes import Dropped
from tunekit.data.rendering.render import EMPTY_ANSWER, NO_ANSWER, NO_WEIGHT
from tunekit.data.rendering.turns import answer_indices, last_answer
from tunekit.errors import DataError, ModelError, Problem, RecipeError
from tunekit.formats.example import ChatExample, CompletionExample, TextExample
from tunekit.objectives.logprobs import loss_of_positions, sums_of_positions
from tunekit.objectives.rows import TextEncoder, TextObjective, fill_with, put_around
from tunekit.recipe.objectives.seq2seq import Seq2seqSettings

Array = NDArray[Any]
EMPTY_SOURCE = "empty prompt, which leaves the encoder nothing to read"
ONLY_LAST_ANSWER = "conversations with earlier answers: the encoder reads them, and the last is trained on"


class Seq2seqEncoder(TextEncoder):
    """A row is the source with the tokenizer's special tokens around it, and the answer after the token that begins
    every answer."""

    def encode(self, example: Any, origin: str) -> Row:
        """The row.

        Raises: Dropped where nothing can be trained on; DataError where the row is wrong; ModelError where the base
            does not say how answers begin.
        """
        if isinstance(example, TextExample):
            raise DataError("running text has no source for the encoder to read", "give a prompt and its completion")
        if isinstance(example, ChatExample):
            several = len(answer_indices(example.messages, self.train_on)) > 1
            self.notices.update([ONLY_LAST_ANSWER] if several else [])
        found = self.prompt(example)
        if found is None:
            raise Dropped(EMPTY_ANSWER if isinstance(example, CompletionExample) else NO_ANSWER)
        start = self.tokenizer.answer_start_id
        if start is None:
            what, how = "the base does not say with which token its answers begin", "write decoder_start_token_id into"
            raise ModelError(what, f"{how} its config.json", key="model.name_or_path")
        source, answer = found[0], self.tokenizer.encode_answer(found[1])
        if not source:
            raise Dropped(EMPTY_SOURCE)
        eos = self.tokenizer.eos_id
        answer = answer if eos is None or answer[-1:] == [eos] else [*answer, eos]
        weight = answer_weight(example)
        if not weight:
            raise Dropped(NO_WEIGHT)
        return make_row(np.asarray(source, np.int32), np.asarray([start, *answer], np.int32), origin, weight=weight)

    def prompt(self, example: Any) -> tuple[list[int], str] | None:
        """What the encoder reads, and the answer's text."""
        found = self.renderer.source(example)
        if found is None:
            return None
        text, ids, answer = found
        return (self.tokenizer.encode_source(text) if ids is None else self._as_source(ids)), answer

    def question(self, text: str) -> list[int]:
        """What the encoder reads where a user writes `text`."""
        if self.renderer.has_template and self.tokenizer.answer_start_id is not None:
            return self._as_source(self.renderer.question(text))
        return self.tokenizer.encode_source(text)

    def _as_source(self, ids: list[int]) -> list[int]:
        """Rendered ids with the special tokens around them that the tokenizer puts around a text."""
        before, after = put_around(self.tokenizer)
        before = [] if ids[: len(before)] == before else before  # the template may write them itself
        after = [] if ids[len(ids) - len(after) :] == after else after
        return [*before, *ids, *after]


def answer_weight(example: Any) -> float:
    """How much the last answer of an example counts."""
    index = last_answer(example) if isinstance(example, ChatExample) else None
    return float(example.weight * (1.0 if index is None else example.messages[index].weight))


def make_row(source: Array, answer: Array, origin: str, number: int = 0, weight: float = 1.0) -> Row:
    """A row of (S,) source ids and (A + 1,) answer ids, the first of which begins it; A of them are predicted, and each
    counts as `weight` says."""
    tokens = max(len(answer) - 1, 0)
    parts = {"source": source, "answer": answer, "weight": np.array([weight], np.float32)}
    return Row(parts, (len(source), tokens), tokens, origin, number)


class Seq2seq(TextObjective):
    """loss = sum over the answers' tokens of -w log p(token | source, tokens before it); divided by the sum of the
    step's w, which is 1 or what the row says."""

    layout = RowLayout({"source": "<i4", "answer": "<i4", "weight": "<f4"}, ("source", "answer"), sizes=2)

    def row_encoder(self, options: EncodeOptions) -> Seq2seqEncoder:
        """Raises: RecipeError for options that mean nothing where an encoder reads the prompt."""
        problems = []
        if options.train_on == "all":
            what = "the prompt is read by an encoder, which predicts nothing"
            problems.append(Problem(what, "write assistant or last", key="data.train_on"))
        if options.excess_length == "split":
            what = "the later pieces of a row would have no source for the encoder to read"
            problems.append(Problem(what, "write drop, truncate or error", key="data.excess_length"))
        if problems:
            raise RecipeError.of(problems)
        return Seq2seqEncoder(self.tokenizer, options)

    def cut(self, row: Row, start: int, stop: int) -> Row:
        """Of source and answer end to end, tokens start .. stop-1."""
        source, answer = row.parts["source"], row.parts["answer"]
        left = slice(max(start - len(source), 0), max(stop - len(source), 0) + 1)
        return make_row(source[start:stop], answer[left], row.origin, row.number, float(row.parts["weight"][0]))

    def fill(self, rows: Iterator[Row], size: int, part: int) -> list[Row]:
        """One row, nearly all of it source (part 0) or answer (part 1)."""
        found = fill_with(rows, size, self)
        ids = np.concatenate([row.parts[name] for row in found for name in ("source", "answer")])
        source = size - 1 if part == 0 else 1
        filled = np.resize(ids, size + 1)
        return [make_row(filled[:source], filled[source:], found[0].origin, found[0].number)]

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Source and answer, each padded by itself; the answer needs no mask, since padding comes last.

        Shapes: input_ids, attention_mask (B, S); decoder_input_ids, labels (B, A): position a predicts labels[a].
        """
        rows = [row for (row,) in sequences]
        pad = self.tokenizer.pad_id
        answers = [row.parts["answer"] for row in rows]
        inputs = {
            "input_ids": lay_end_to_end([[row.parts["source"]] for row in rows], pad),
            "attention_mask": real_positions([row.sizes[0] for row in rows]).long(),
            "decoder_input_ids": lay_end_to_end([[answer[:-1]] for answer in answers], pad),
        }
        labels = lay_end_to_end([[answer[1:]] for answer in answers], IGNORED)
        return Batch(inputs, {"labels": labels}, tuple(map(tuple, sequences)))

    def spans(self, row: Row) -> list[Part]:
        """What the encoder reads, and the answer."""
        source, answer = row.parts["source"], row.parts["answer"]
        weight = float(row.parts["weight"][0])
        title = "" if weight == 1 else f"weight of the loss: {weight:.6g}"
        return [Part(source, np.zeros(len(source), np.bool_)), Part(answer, np.arange(len(answer)) > 0, title)]

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """Shapes: output.hidden (B, A, D) -> total (1,)."""
        return loss_of_positions(output, *_labelled(batch))

    def units(self, batch: Batch) -> Tensor:
        """(1,) float64: tokens of the answers, each as often as it counts."""
        weights = _labelled(batch)[2]
        return super().units(batch) if weights is None else weights.sum(dtype=torch.float64)[None]

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """loss, correct and units, over tokens of the answers."""
        return sums_of_positions(output, *_labelled(batch), batch)


def _labelled(batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """(N,) indices into the flattened positions of the answers, their labels, and their weights if any is not 1."""
    labels = batch.targets["labels"]  # (B, A)
    rows, columns = torch.nonzero(labels != IGNORED, as_tuple=True)
    weights = torch.tensor([float(row.parts["weight"][0]) for row in batch.rows])  # (B,)
    return rows * labels.shape[1] + columns, labels[rows, columns], None if (weights == 1).all() else weights[rows]


def make(settings: Seq2seqSettings, processor: Tokenizer, facts: Mapping[str, Any]) -> Seq2seq:
    """The objective of `objective: seq2seq`."""
    return Seq2seq(settings, processor)
