"""Encoded rows as flat arrays: one for each part, and one record a row. In memory, or mapped from a file."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tunekit.contracts import Row, RowLayout, Rows

RECORDS = "rows.bin"
Files = dict[str, np.dtype[Any]]  # file name -> what it holds


def files_of(layout: RowLayout) -> Files:
    """One file for each part of a row, and one of records."""
    lengths, sizes = (len(layout.parts),), (layout.sizes,)
    plain = [(name, "<i8") for name in ("supervised", "line", "number")]
    record = np.dtype([("lengths", "<i8", lengths), ("sizes", "<i8", sizes), *plain, ("digest", "<u8")])
    return {**{f"{name}.bin": np.dtype(kind) for name, kind in layout.parts.items()}, RECORDS: record}


class TokenStore:
    """Rows of one source. A record has the `lengths` of a row's parts, its `sizes` and what is `supervised` in it;
    `line` is where it began, `number` its place among the rows as written, from 0, and `digest` a hash of the whole row
    of which it may be a piece.
    """

    def __init__(self, layout: RowLayout, arrays: Sequence[NDArray[Any]]) -> None:
        *parts, self.records = arrays  # (values,) of each part; (rows,)
        self.parts = dict(zip(layout.parts, parts, strict=True))
        ends = np.cumsum(self.records["lengths"], axis=0, dtype=np.int64)  # (rows, parts)
        self.offsets = np.concatenate([np.zeros_like(ends[:1]), ends]) if len(ends) else ends

    def __len__(self) -> int:
        return len(self.records)

    def row(self, index: int, name: str, number: int) -> Row:
        """One row, as copies; `number` of all rows of the run."""
        bounds = self.offsets[index : index + 2].T.tolist()
        parts = {
            part: np.array(values[start:stop])
            for (part, values), (start, stop) in zip(self.parts.items(), bounds, strict=True)
        }
        record = self.records[index]
        sizes = tuple(record["sizes"].tolist())
        return Row(parts, sizes, int(record["supervised"]), f"{name}:{int(record['line'])}", number)


def map_store(folder: Path, layout: RowLayout) -> TokenStore:
    """The store written in a folder, without reading its tokens."""
    return TokenStore(layout, [_map(folder / name, kind) for name, kind in files_of(layout).items()])


def _map(path: Path, kind: np.dtype[Any]) -> NDArray[Any]:
    if path.stat().st_size == 0:
        return np.empty(0, dtype=kind)
    return np.memmap(path, dtype=kind, mode="r")


class StoreWriter:
    """Appends rows to one stream a file and keeps their sha256; in files, memory does not grow with the rows."""

    def __init__(self, layout: RowLayout, streams: Sequence[IO[bytes]]) -> None:
        self._parts, self._files, self._streams = tuple(layout.parts), files_of(layout), streams
        self._hashes = [hashlib.sha256() for _ in streams]

    def add(self, row: Row, line: int, number: int, digest: int) -> None:
        """One row more."""
        parts = [row.parts[name] for name in self._parts]
        lengths = tuple(map(len, parts))
        record = np.array([(lengths, row.sizes, row.supervised, line, number, digest)], dtype=self._files[RECORDS])
        columns = zip((*parts, record), self._files.values(), self._streams, self._hashes, strict=True)
        for values, kind, stream, digester in columns:
            raw = np.ascontiguousarray(values, dtype=kind).tobytes()
            stream.write(raw)
            digester.update(raw)

    def hashes(self) -> dict[str, str]:
        """sha256 of each file so far."""
        return {name: digester.hexdigest() for name, digester in zip(self._files, self._hashes, strict=True)}


def memory_streams(layout: RowLayout) -> list[io.BytesIO]:
    """Streams for a store that is kept in memory."""
    return [io.BytesIO() for _ in files_of(layout)]


def store_from_memory(layout: RowLayout, streams: Sequence[io.BytesIO]) -> TokenStore:
    """The store that was written to memory."""
    pairs = zip(streams, files_of(layout).values(), strict=True)
    return TokenStore(layout, [np.frombuffer(stream.getvalue(), dtype=kind) for stream, kind in pairs])


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
    """Rows over parts of several stores, one after the other, numbered from `first` on."""

    def __init__(self, parts: Sequence[Part], first: int = 0) -> None:
        self.parts, self.first = tuple(parts), first
        self.starts = np.concatenate([[0], np.cumsum([len(part.chosen) for part in self.parts])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        part = self.parts[number]
        return part.store.row(int(part.chosen[index - self.starts[number]]), part.name, self.first + index)

    def _column(self, name: str, kind: type[Any]) -> NDArray[Any]:
        columns = [part.store.records[name][part.chosen] for part in self.parts]
        empty = np.empty((0, 1) if name == "sizes" else 0, dtype=kind)
        return np.concatenate(columns).astype(kind) if columns else empty

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(rows, sizes) of each row's parts."""
        return self._column("sizes", np.int64)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(rows,) the sizes of each row, added up."""
        return self.sizes.sum(axis=-1)

    @property
    def supervised(self) -> NDArray[np.int64]:
        """(rows,) what the loss sums over in each row."""
        return self._column("supervised", np.int64)

    @property
    def digests(self) -> NDArray[np.uint64]:
        """(rows,) hash of the whole row: equal rows, and pieces of one, have equal ones."""
        return self._column("digest", np.uint64)


def by_source(rows: Rows) -> dict[str, Rows]:
    """The rows of each source that has any, under its name, numbered where a file is several; all of them where they
    come of none."""
    if not isinstance(rows, ChosenRows):
        return {"": rows}
    filled = [(part, first) for part, first in zip(rows.parts, rows.starts.tolist(), strict=False) if len(part.chosen)]
    names = [part.name for part, _ in filled]
    return {
        name if names.count(name) == 1 else f"{name} ({names[: at + 1].count(name)})": ChosenRows([part], first)
        for at, (name, (part, first)) in enumerate(zip(names, filled, strict=True))
    }
