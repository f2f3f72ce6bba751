"""Encoded rows as three flat arrays: ids, mask, and one record a row. In memory, or mapped from a file.

Comes in: EncodedRows one by one.  Goes out: TokenStore and views of several of them.  Next: cache.py, rows.py.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tunekit.contracts import EncodedRow

RECORD = np.dtype([("length", "<i8"), ("supervised", "<i8"), ("line", "<i8"), ("number", "<i8"), ("digest", "<u8")])
FILES = ("ids.bin", "trained.bin", "rows.bin")
TYPES = (np.dtype("<i4"), np.dtype(np.bool_), RECORD)


class TokenStore:
    """Rows of one source. `line` is where a row began, `number` its place among the rows as written, from 0, and
    `digest` a hash of its ids.
    """

    def __init__(self, ids: NDArray[Any], trained: NDArray[Any], records: NDArray[Any]) -> None:
        self.ids, self.trained, self.records = ids, trained, records  # (tokens,) (tokens,) (rows,)
        self.offsets = np.concatenate([[0], np.cumsum(records["length"])]).astype(np.int64)  # (rows + 1,)

    def __len__(self) -> int:
        return len(self.records)

    def row(self, index: int, name: str) -> EncodedRow:
        """One row, as copies."""
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        origin = f"{name}:{int(self.records['line'][index])}"
        return EncodedRow(np.array(self.ids[part]), np.array(self.trained[part]), origin)


def map_store(folder: Path) -> TokenStore:
    """The store written in a folder, without reading its tokens."""
    return TokenStore(*(_map(folder / name, kind) for name, kind in zip(FILES, TYPES, strict=True)))


def _map(path: Path, kind: np.dtype[Any]) -> NDArray[Any]:
    if path.stat().st_size == 0:
        return np.empty(0, dtype=kind)
    return np.memmap(path, dtype=kind, mode="r")


class StoreWriter:
    """Appends rows to three streams and keeps their sha256; memory does not grow with the rows if they are files."""

    def __init__(self, streams: Sequence[IO[bytes]]) -> None:
        self._streams = streams
        self._hashes = [hashlib.sha256() for _ in streams]

    def add(self, row: EncodedRow, line: int, number: int, digest: int) -> None:
        """One row more."""
        record = np.array([(len(row.ids), row.supervised_tokens, line, number, digest)], dtype=RECORD)  # (1,)
        for stream, digester, values, kind in zip(
            self._streams, self._hashes, (row.ids, row.trained, record), TYPES, strict=True
        ):
            raw = np.ascontiguousarray(values, dtype=kind).tobytes()
            stream.write(raw)
            digester.update(raw)

    def hashes(self) -> dict[str, str]:
        """sha256 of each file so far."""
        return {name: digester.hexdigest() for name, digester in zip(FILES, self._hashes, strict=True)}


def memory_streams() -> list[io.BytesIO]:
    """Streams for a store that is kept in memory."""
    return [io.BytesIO() for _ in FILES]


def store_from_memory(streams: Sequence[io.BytesIO]) -> TokenStore:
    """The store that was written to memory."""
    arrays = [np.frombuffer(stream.getvalue(), dtype=kind) for stream, kind in zip(streams, TYPES, strict=True)]
    return TokenStore(*arrays)


@dataclass(frozen=True)
class Part:
    """Chosen rows of one store, under the name that their origins carry."""

    store: TokenStore
    chosen: NDArray[np.int64]  # (rows,), ascending
    name: str

    @property
    def written_rows(self) -> int:
        """Rows as they were written: the pieces of a split row count once."""
        numbers = self.store.records["number"][self.chosen]  # (rows,), ascending
        return int(np.count_nonzero(np.diff(numbers))) + bool(len(numbers))


class ChosenRows:
    """EncodedRows over parts of several stores, one after the other."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.starts = np.concatenate([[0], np.cumsum([len(part.chosen) for part in self.parts])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> EncodedRow:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        part = self.parts[number]
        return part.store.row(int(part.chosen[index - self.starts[number]]), part.name)

    def _column(self, name: str, kind: type[Any]) -> NDArray[Any]:
        columns = [part.store.records[name][part.chosen] for part in self.parts]
        return np.concatenate(columns).astype(kind) if columns else np.empty(0, dtype=kind)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(rows,) tokens of each row."""
        return self._column("length", np.int64)

    @property
    def supervised(self) -> NDArray[np.int64]:
        """(rows,) supervised tokens of each row."""
        return self._column("supervised", np.int64)

    @property
    def digests(self) -> NDArray[np.uint64]:
        """(rows,) hash of each row: equal rows have equal ones."""
        return self._column("digest", np.uint64)
