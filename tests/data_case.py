"""Tokenizers and rows that the data tests share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tunekit.contracts import EncodedRow
from tunekit.data.batching.windows import BatchSettings
from tunekit.formats.example import ChatExample, Message
from tunekit.machine.forks import Child, fork_child
from tunekit.model.text.tokenizer import LoadedTokenizer, load_tokenizer
from tunekit.recipe.model import ModelSection


def tokenizer_of(folder: Path) -> LoadedTokenizer:
    """The tokenizer of a model folder."""
    return load_tokenizer(ModelSection(name_or_path=str(folder)))


def chat(*turns: tuple[str, str]) -> ChatExample:
    """A conversation."""
    return ChatExample(tuple(Message(role, content) for role, content in turns))


def trained_texts(row: EncodedRow, tokenizer: LoadedTokenizer) -> list[str]:
    """Each stretch of trained tokens, decoded."""
    texts: list[str] = []
    current: list[int] = []
    for token_id, trained in zip(row.ids.tolist(), row.trained.tolist(), strict=True):
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
    """EncodedRows of given lengths; token t of row r is 1000 r + t, all of them trained."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = np.array(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> EncodedRow:
        length = int(self.lengths[index])
        ids = np.arange(length, dtype=np.int32) + 1000 * index
        return EncodedRow(ids, np.ones(length, dtype=np.bool_), f"rows:{index}")

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
        "pad_id": 0,
    }
    return BatchSettings(**{**values, **changes})


def recording_fork(pids: list[int]) -> Callable[[Callable[[], None]], Child | None]:
    """fork_child, which notes every child that it makes."""

    def fork(work: Callable[[], None]) -> Child | None:
        child = fork_child(work)
        assert child is not None
        assert child._pid is not None
        pids.append(child._pid)
        return child

    return fork
