"""Stores encoded rows in memory or in mapped files: one flat array per part (such as ids), and one record per row."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tunekit.contracts import Row, RowLayout, Rows
from tunekit.data.reading.several import row_place

RECORDS, RAW = "rows.bin", "raw.bin"
Files = dict[str, np.dtype[Any]]  # file name -> dtype of its values


def files_of(layout: RowLayout) -> Files:
    """The files of a store with their dtypes: one file for each part of a row, one file for the records, and one for
    the hashes of the raw rows."""
    lengths, sizes = (len(layout.parts),), (layout.sizes,)
    plain = [(name, "<i8") for name in ("supervised", "line", "number")]
    record = np.dtype([("lengths", "<i8", lengths), ("sizes", "<i8", sizes), *plain, ("digest", "<u8")])
    parts = {f"{name}.bin": np.dtype(kind) for name, kind in layout.parts.items()}
    return {**parts, RECORDS: record, RAW: np.dtype("<u8")}


class TokenStore:
    """Rows of one source: one array of values per part (such as ids), one record per row, and `raw`: the hash of each
    raw row, by its number, also of the dropped rows.

    The fields of a record are:
    - `lengths`: the number of values in each part of the row
    - `sizes`: the row's sizes
    - `supervised`: the number of supervised elements
    - `line`: the line where the row begins
    - `number`: the index of the raw row in the source, from 0; several rows can be made from it
    - `digest`: the hash of this row
    """

    def __init__(self, layout: RowLayout, arrays: Sequence[NDArray[Any]]) -> None:
        *parts, self.records, self.raw = arrays  # (values,) of each part; (rows,); (raw rows,)
        self.parts = dict(zip(layout.parts, parts, strict=True))
        ends = np.cumsum(self.records["lengths"], axis=0, dtype=np.int64)  # (rows, parts)
        self.offsets = np.concatenate([np.zeros_like(ends[:1]), ends]) if len(ends) else ends

    def __len__(self) -> int:
        return len(self.records)

    def row(self, index: int, origin: str, number: int) -> Row:
        """One row, with copied arrays. `number`: the row's number among all rows of the run."""
        bounds = self.offsets[index : index + 2].T.tolist()
        parts = {
            part: np.array(values[start:stop])
            for (part, values), (start, stop) in zip(self.parts.items(), bounds, strict=True)
        }
        record = self.records[index]
        sizes = tuple(record["sizes"].tolist())
        return Row(parts, sizes, int(record["supervised"]), origin, number)


def map_store(folder: Path, layout: RowLayout) -> TokenStore:
    """The store in a folder, mapped into memory: tokens are read when they are used."""
    return TokenStore(layout, [_map(folder / name, kind) for name, kind in files_of(layout).items()])


def _map(path: Path, kind: np.dtype[Any]) -> NDArray[Any]:
    if path.stat().st_size == 0:
        return np.empty(0, dtype=kind)
    return np.memmap(path, dtype=kind, mode="r")


class StoreWriter:
    """Appends rows to one stream per file and updates the sha256 of each file."""

    def __init__(self, layout: RowLayout, streams: Sequence[IO[bytes]]) -> None:
        self._parts, self._files, self._streams = tuple(layout.parts), files_of(layout), streams
        self._kinds = list(self._files.values())
        self._hashes = [hashlib.sha256() for _ in streams]

    def add(self, row: Row, line: int, number: int, digest: int) -> None:
        """Append one row."""
        parts = [row.parts[name] for name in self._parts]
        lengths = tuple(map(len, parts))
        record = np.array([(lengths, row.sizes, row.supervised, line, number, digest)], dtype=self._files[RECORDS])
        for file, values in enumerate((*parts, record)):
            self._append(file, values)

    def add_raw(self, digest: int) -> None:
        """Append the hash of one raw row."""
        self._append(-1, digest)

    def _append(self, file: int, values: ArrayLike) -> None:
        raw = np.ascontiguousarray(values, dtype=self._kinds[file]).tobytes()
        self._streams[file].write(raw)
        self._hashes[file].update(raw)

    def hashes(self) -> dict[str, str]:
        """sha256 of each file so far."""
        return {name: digester.hexdigest() for name, digester in zip(self._files, self._hashes, strict=True)}


def memory_streams(layout: RowLayout) -> list[io.BytesIO]:
    """The streams for a store in memory."""
    return [io.BytesIO() for _ in files_of(layout)]


def store_from_memory(layout: RowLayout, streams: Sequence[io.BytesIO]) -> TokenStore:
    """The store that was written to `memory_streams`."""
    pairs = zip(streams, files_of(layout).values(), strict=True)
    return TokenStore(layout, [np.frombuffer(stream.getvalue(), dtype=kind) for stream, kind in pairs])


@dataclass(frozen=True)
class Part:
    """Selected rows of one store. `name`: the source's name in the rows' origins. `files`: the names of its files, if
    it has several."""

    store: TokenStore
    chosen: NDArray[np.int64]  # (rows,), ascending
    name: str
    files: tuple[str, ...] = ()

    def origin(self, index: int) -> str:
        """The file and the line of the selected row `index`."""
        return row_place(self.name, self.files, int(self.store.records["line"][self.chosen[index]]))

    @property
    def written_rows(self) -> int:
        """Number of rows in the source; the pieces of a split row count once."""
        return int(np.count_nonzero(np.diff(self.numbers))) + bool(len(self.numbers))

    @property
    def numbers(self) -> NDArray[np.int64]:
        """(rows,) the number of each row's raw row in the source, ascending."""
        return np.asarray(self.store.records["number"][self.chosen], dtype=np.int64)


class ChosenRows:
    """The rows of several parts, one part after the other. `first`: the first row's number in the run."""

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
        index_in_part = index - int(self.starts[number])
        return part.store.row(int(part.chosen[index_in_part]), part.origin(index_in_part), self.first + index)

    def _column(self, name: str, kind: type[Any]) -> NDArray[Any]:
        columns = [part.store.records[name][part.chosen] for part in self.parts]
        empty = np.empty((0, 1) if name == "sizes" else 0, dtype=kind)
        return np.concatenate(columns).astype(kind) if columns else empty

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(rows, sizes) the sizes of each row."""
        return self._column("sizes", np.int64)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(rows,) the sum of each row's sizes."""
        return self.sizes.sum(axis=-1)

    @property
    def supervised(self) -> NDArray[np.int64]:
        """(rows,) the number of elements over which the loss of each row is summed."""
        return self._column("supervised", np.int64)

    @property
    def digests(self) -> NDArray[np.uint64]:
        """(rows,) the hash of each row."""
        return self._column("digest", np.uint64)


def part_lengths(rows: Rows, part: str) -> NDArray[np.int64]:
    """(rows,) the number of values in this part of each row."""
    if not isinstance(rows, ChosenRows):
        return np.array([len(rows[number].parts[part]) for number in range(len(rows))], np.int64)
    lengths = [
        each.store.records["lengths"][each.chosen, list(each.store.parts).index(part)]
        for each in rows.parts
        if len(each.chosen)
    ]
    return np.concatenate(lengths) if lengths else np.zeros(0, np.int64)


def by_source(rows: Rows) -> dict[str, Rows]:
    """The rows of each source, by the source's name. Equal names get numbers; sources without rows are left out.

    Rows without sources are returned under the name "".
    """
    if not isinstance(rows, ChosenRows):
        return {"": rows}
    filled = [(part, first) for part, first in zip(rows.parts, rows.starts.tolist(), strict=False) if len(part.chosen)]
    names = [part.name for part, _ in filled]
    return {
        name if names.count(name) == 1 else f"{name} ({names[: at + 1].count(name)})": ChosenRows([part], first)
        for at, (name, (part, first)) in enumerate(zip(names, filled, strict=True))
    }
