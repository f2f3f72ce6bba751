"""Large sources in pieces that can be read on their own and in any order.

JSON Lines is cut at line ends, Parquet at its row groups, a folder of classes file by file. What cannot be entered in
the middle (CSV, a compressed file, a hub data set, a source cut short by max_rows) is one shard, read from its start.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path

from tunekit.data.reading.data_file import DataFile, inspect_file, open_bytes
from tunekit.data.reading.folder import is_folder, names_hash
from tunekit.data.reading.lines import LONGEST_LINE_BYTES, RawRow, parse_line
from tunekit.data.reading.problems import Problems
from tunekit.data.reading.source import is_data_set, prepare_rows, read_row_groups, read_source, row_group_sizes
from tunekit.errors import DataError
from tunekit.recipe.data import Source

SHARD_BYTES = 2**20
STREAM_SHARE = 0.25  # of the machine's memory: a larger file is streamed


@dataclass(frozen=True)
class Shard:
    """Bytes start .. stop-1 of a JSON Lines file, or Parquet row group `start`; `before` lines (rows) precede it."""

    start: int
    stop: int
    before: int


@dataclass(frozen=True)
class Sharded:
    """A source in shards; `lines` of all of them, where known, and the sha256 of the file (of the name, for a hub)."""

    source: Source
    file: DataFile | None
    shards: tuple[Shard, ...]
    lines: int | None
    content: str
    rows: tuple[RawRow, ...] = ()  # of a folder: they only name files

    def read(self, shard: Shard, problems: Problems) -> Iterator[RawRow]:
        """The raw rows of one shard."""
        if self.rows:
            return iter(self.rows[shard.start : shard.stop])
        if self.file is None or shard.stop < 0:
            return read_source(self.source, problems)
        if self.file.kind == "parquet":
            rows = read_row_groups(self.file, problems, [shard.start], shard.before)
        else:
            rows = _read_lines(self.file, shard, problems)
        return prepare_rows(rows, self.source)


def must_stream(source: Source, memory_bytes: int) -> bool:
    """Whether a source is read on the fly: where the recipe says so, or its file is a quarter of memory or more."""
    if source.streaming:
        return True
    try:
        return Path(source.path).is_file() and os.stat(source.path).st_size >= STREAM_SHARE * memory_bytes
    except (OSError, ValueError):
        return False  # reading it will say why


def shard_source(source: Source) -> Sharded:
    """The source's shards, after one pass over its bytes. Raises: DataError for what cannot be streamed at all."""
    if is_data_set(source.path):
        name = hashlib.sha256(f"{source.path}@{source.revision}/{source.split}".encode()).hexdigest()
        return Sharded(source, None, (Shard(0, -1, 0),), None, name)
    if is_folder(source.path):
        rows = tuple(read_source(source, Problems()))
        shards = tuple(Shard(number, number + 1, number) for number in range(len(rows)))
        return Sharded(source, None, shards, len(rows), names_hash(Path(source.path)), rows)
    file = inspect_file(Path(source.path))
    if file.kind in ("json", "text"):
        kind = "JSON array" if file.kind == "json" else "text file"
        raise DataError(f"a {kind} cannot be streamed", "write it as JSON Lines", file=source.path)
    shards, lines, content = _scan(file)
    if file.kind == "parquet":
        shards, lines = _row_groups(file)
    if file.compressed or file.kind == "csv" or source.max_rows is not None:
        known = None if file.compressed else min(lines, source.max_rows or lines)
        return Sharded(source, file, (Shard(0, -1, 0),), known, content)
    return Sharded(source, file, shards, lines, content)


def _scan(file: DataFile) -> tuple[tuple[Shard, ...], int, str]:
    """Shards cut at the first line end after each SHARD_BYTES, the number of lines, sha256 of the bytes."""
    digest = hashlib.sha256()
    shards: list[Shard] = []
    start = position = lines = before = 0
    last = b"\n"
    with file.path.open("rb") as stream:
        while chunk := stream.read(SHARD_BYTES):
            digest.update(chunk)
            end = chunk.find(b"\n", max(start + SHARD_BYTES - position - 1, 0))
            if end >= 0:
                stop = position + end + 1
                shards.append(Shard(start, stop, before))
                before = lines + chunk.count(b"\n", 0, end + 1)
                start = stop
            lines += chunk.count(b"\n")
            position += len(chunk)
            last = chunk[-1:]
    if start < position:
        shards.append(Shard(start, position, before))
    return tuple(shards), lines + (last != b"\n"), digest.hexdigest()


def _row_groups(file: DataFile) -> tuple[tuple[Shard, ...], int]:
    *starts, rows = accumulate(row_group_sizes(file), initial=0)
    return tuple(Shard(number, number + 1, before) for number, before in enumerate(starts)), rows


def _read_lines(file: DataFile, shard: Shard, problems: Problems) -> Iterator[RawRow]:
    name = str(file.path)
    with open_bytes(file) as stream:
        stream.seek(shard.start)
        number = shard.before
        while stream.tell() < shard.stop and (raw := stream.readline(LONGEST_LINE_BYTES)):
            number += 1
            yield from parse_line(raw, number, name, problems)


def first_rows(sharded: Sharded, count: int, problems: Problems) -> list[RawRow]:
    """The first rows of the source, in its own order."""
    rows = (row for shard in sharded.shards for row in sharded.read(shard, problems))
    return list(islice(rows, count))
