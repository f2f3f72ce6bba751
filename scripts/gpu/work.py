"""The tokens of a row (a measured run). They depend only on step and micro-batch, so all tools compute with the same
tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
from shapes import MODELS, Row

from tunekit.contracts import Batch, Objective, StepBatches
from tunekit.contracts import Row as EncodedRow
from tunekit.objectives.base import make_objective
from tunekit.objectives.rows.sequences import sequence_parts
from tunekit.objectives.rows.sources import source_parts
from tunekit.recipe.objectives.seq2seq import Seq2seqSettings
from tunekit.recipe.objectives.sft import SftSettings

MEDIAN_TOKENS, SPREAD, SHORTEST = 180, 0.6, 16  # of documents, log-normal
IDS_ONLY: Any = SimpleNamespace(pad_id=0, fingerprint="random ids", images=None)  # in the place of a tokenizer


def objective_of(row: Row) -> Objective:
    """The objective of the row."""
    return make_objective(Seq2seqSettings() if row.reads_source else SftSettings(), IDS_ONLY)


def micro_batch(row: Row, step: int, number: int) -> Batch:
    """A micro-batch of `rows` sequences of `length` tokens. Supervised are all tokens; in packed documents, the second
    half of each document; with a source, only the answer."""
    draw, vocabulary = np.random.default_rng([step, number]), MODELS[row.model]["vocab_size"]
    sequences = []
    for index in range(row.rows):
        lengths = _documents(draw, row.length) if row.documents else [row.length]
        sequences.append(
            [
                _made_row(
                    row,
                    draw.integers(3, vocabulary, length).astype(np.int32),
                    f"step {step}, row {index}, document {place}",
                )
                for place, length in enumerate(lengths)
            ]
        )
    return objective_of(row).rows.collate(sequences)


def _made_row(row: Row, ids: np.ndarray, origin: str) -> EncodedRow:
    """A row from token ids. If it has a source and an answer, the answer begins with the first token after the
    source."""
    kind = objective_of(row).rows
    if row.reads_source:
        return kind.make_row(source_parts(ids[: row.source_tokens], ids[row.source_tokens :]), origin)
    trained = np.arange(len(ids)) >= (len(ids) // 2 if row.documents else 0)
    return kind.make_row(sequence_parts(ids, trained), origin)


def _documents(draw: np.random.Generator, tokens: int) -> list[int]:
    lengths: list[int] = []
    while sum(lengths) + SHORTEST <= tokens:
        drawn = max(SHORTEST, int(draw.lognormal(math.log(MEDIAN_TOKENS), SPREAD)))
        lengths.append(min(drawn, tokens - sum(lengths)))
    return lengths


def step(row: Row, step: int) -> StepBatches:
    """The micro-batches of one step."""
    batches = tuple(micro_batch(row, step, number) for number in range(row.micro_batches))
    return StepBatches(step, 0.0, tuple(range(row.micro_batches)), batches)


class RowSteps:
    """A StepSource that yields the steps of a row."""

    def __init__(self, row: Row) -> None:
        self.row, self.count = row, row.steps

    def after(self, first_step: int) -> Iterator[StepBatches]:
        return (step(self.row, number) for number in range(first_step, self.count))
