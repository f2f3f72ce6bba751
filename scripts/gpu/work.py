"""The tokens of a row: the same for every tool, seeded by step and micro-batch."""

from __future__ import annotations

import math

import numpy as np
from shapes import MODELS, Row

from tunekit.contracts import Batch, EncodedRow, Window
from tunekit.data.batching.pad import collate_rows

MEDIAN_TOKENS, SPREAD, SHORTEST = 180, 0.6, 16  # of documents, log-normal


def micro_batch(row: Row, step: int, number: int) -> Batch:
    """`rows` sequences of `length` tokens, every token supervised; or of documents, the second half of each; or of a
    source and an answer, which is supervised."""
    draw, vocabulary = np.random.default_rng([step, number]), MODELS[row.model]["vocab_size"]
    sequences = []
    for index in range(row.rows):
        lengths = _documents(draw, row.length) if row.documents else [row.length]
        sequences.append(
            [
                EncodedRow(
                    draw.integers(3, vocabulary, length).astype(np.int32),
                    np.arange(length) >= (length // 2 if row.documents else _first_supervised(row)),
                    f"step {step}, row {index}, document {place}",
                )
                for place, length in enumerate(lengths)
            ]
        )
    return collate_rows(sequences, [range(len(each)) for each in sequences], pad_id=0, packed=row.documents)


def _first_supervised(row: Row) -> int:
    """Behind a source stands one more token, with which the answer begins."""
    return row.source_tokens + 1 if row.reads_source else 0


def _documents(draw: np.random.Generator, tokens: int) -> list[int]:
    lengths: list[int] = []
    while sum(lengths) + SHORTEST <= tokens:
        drawn = max(SHORTEST, int(draw.lognormal(math.log(MEDIAN_TOKENS), SPREAD)))
        lengths.append(min(drawn, tokens - sum(lengths)))
    return lengths


def window(row: Row, step: int) -> Window:
    """The micro-batches of one step."""
    batches = tuple(micro_batch(row, step, number) for number in range(row.micro_batches))
    return Window(step, 0.0, tuple(range(row.micro_batches)), batches)


class Windows:
    """WindowSource over a row's steps."""

    def __init__(self, row: Row) -> None:
        self.row, self.steps = row, row.steps

    def windows(self, first_step: int):
        return (window(self.row, step) for step in range(first_step, self.steps))
