"""Tokenizers and rows that the data tests share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tunekit.contracts import Array, EncodeOptions, Objective, Row, RowKind, Tokenizer
from tunekit.data.batching.steps import BatchSettings
from tunekit.formats.example import ChatExample, Example, Message
from tunekit.model.text.tokenizer import LoadedTokenizer, load_tokenizer
from tunekit.objectives.base import make_objective
from tunekit.objectives.rows.sequences import sequence_parts
from tunekit.objectives.rows.sources import source_parts
from tunekit.recipe.bases.section import ObjectiveSettings
from tunekit.recipe.model import ModelSection
from tunekit.recipe.objectives.seq2seq import Seq2seqSettings
from tunekit.recipe.objectives.sft import SftSettings


def tokenizer_of(folder: Path) -> LoadedTokenizer:
    """The tokenizer of a model folder."""
    return load_tokenizer(ModelSection(name_or_path=str(folder)))


def chat(*turns: tuple[str, str]) -> ChatExample:
    """A conversation."""
    return ChatExample(tuple(Message(role, content) for role, content in turns))


class BareTokenizer:
    """What an objective asks of a tokenizer once its rows are encoded."""

    fingerprint, unknown_id, images = "of no text", None, None

    def __init__(self, pad_id: int = 0) -> None:
        self.pad_id = pad_id


def objective_of(settings: ObjectiveSettings | None = None, *, pad_id: int = 0) -> Objective:
    """An objective, sft unless another is asked for, over rows that are encoded already."""
    return make_objective(settings or SftSettings(), BareTokenizer(pad_id))  # type: ignore[arg-type]


def sequence_row(ids: Array, trained: Array, origin: str, number: int = 0) -> Row:
    """A row of the objective sft."""
    return objective_of().rows.make_row(sequence_parts(ids, trained), origin, number)


def source_row(source: Array, answer: Array, origin: str) -> Row:
    """A row of the objective seq2seq."""
    return objective_of(Seq2seqSettings()).rows.make_row(source_parts(source, answer), origin)


def encoder_of(
    tokenizer: Tokenizer,
    train_on: str = "assistant",
    template: str | None = None,
    settings: ObjectiveSettings | None = None,
    rewritten_answers: str = "last",
    reasoning: str = "template",
) -> RowKind:
    """The rows of an objective, sft unless another is named, as they encode examples."""
    options = EncodeOptions(train_on, template, 2048, "drop", rewritten_answers, reasoning)
    return make_objective(settings or SftSettings(), tokenizer, options=options).rows


def encode_example(
    example: Example, tokenizer: Tokenizer, train_on: str = "assistant", template: str | None = None
) -> Row:
    """One example as a row of the objective sft."""
    return encoder_of(tokenizer, train_on, template).encode(example, "rows:1")


def trained_texts(row: Row, tokenizer: LoadedTokenizer) -> list[str]:
    """Each stretch of trained tokens, decoded."""
    texts: list[str] = []
    current: list[int] = []
    for token_id, trained in zip(row.parts["ids"].tolist(), row.parts["trained"].tolist(), strict=True):
        if trained:
            current.append(token_id)
        elif current:
            texts.append(tokenizer.decode(current))
            current = []
    return [*texts, tokenizer.decode(current)] if current else texts


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """Rows as JSON Lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


class Rows:
    """Rows of given lengths for the objective sft; token t of row r is 1000 r + t, all of them trained."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = np.array(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Row:
        length = int(self.lengths[index])
        ids = np.arange(length, dtype=np.int32) + 1000 * index
        return sequence_row(ids, np.ones(length, dtype=np.bool_), f"rows:{index}", index)

    @property
    def sizes(self) -> Any:
        """(rows, 1) one part each."""
        return self.lengths[:, None]

    @property
    def supervised(self) -> Any:
        """(rows,) all but the first token."""
        return self.lengths - 1


def settings(**changes: Any) -> BatchSettings:
    """BatchSettings with what a test does not care about filled in."""
    values: dict[str, Any] = {
        "micro_batch_size": 2,
        "micro_batch_tokens": None,
        "gradient_accumulation_steps": 5,
        "max_length": 64,
        "packing": False,
        "shuffle": True,
        "seed": 0,
        "epochs": 1.0,
        "max_steps": None,
    }
    return BatchSettings(**{**values, **changes})
