"""Shards of large sources. Shards can be read separately and in any order.

JSON Lines is cut at line ends, Parquet at row groups, and a folder of classes at files. A source that must be read
from its start (CSV, a compressed file, a hub data set, a source with max_rows) is a single shard.
"""

import hashlib
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


@dataclass(frozen=True)
class Shard:
    """Bytes start .. stop-1 of a JSON Lines file, or row group `start` of a Parquet file.

    `before`: the number of lines (or rows) before the shard.
    """

    start: int
    stop: int
    before: int


@dataclass(frozen=True)
class Sharded:
    """A source with its shards. `lines`: the number of lines, if known. `content`: the sha256 of the file, or of the
    name of a hub data set."""

    source: Source
    file: DataFile | None
    shards: tuple[Shard, ...]
    lines: int | None
    content: str
    rows: tuple[RawRow, ...] = ()  # rows of a folder, which only name files

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
        return prepare_rows(rows, self.source, from_start=shard.before == 0)


def shard_source(source: Source) -> Sharded:
    """The shards of a source, after one pass over its bytes. Raises: DataError if the file cannot be streamed."""
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
        raise DataError(f"a {kind} cannot be streamed", "write the data as JSON Lines", file=source.path)
    shards, lines, content = _scan(file)
    if file.kind == "parquet":
        shards, lines = _row_groups(file)
    if file.compressed or file.kind == "csv" or source.max_rows is not None:
        known = None if file.compressed else min(lines, source.max_rows or lines)
        return Sharded(source, file, (Shard(0, -1, 0),), known, content)
    return Sharded(source, file, shards, lines, content)


def _scan(file: DataFile) -> tuple[tuple[Shard, ...], int, str]:
    """The shards, the number of lines and the sha256 of a file. Shards end at the first line end after SHARD_BYTES."""
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
    """The first `count` rows of the source, in the order of its file."""
    rows = (row for shard in sharded.shards for row in sharded.read(shard, problems))
    return list(islice(rows, count))
