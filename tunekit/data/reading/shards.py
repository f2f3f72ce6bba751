"""Shards of large sources. Shards can be read separately and in any order.

JSON Lines is cut at line ends, Parquet at row groups, and a folder of classes at files. A file that must be read from
its start (CSV, a compressed file) is a single shard, and so is a hub data set and a source with max_rows.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path

from tunekit.data.reading.data_file import DataFile, inspect_file, open_bytes
from tunekit.data.reading.folder import is_folder, names_hash
from tunekit.data.reading.lines import LONGEST_LINE_BYTES, RawRow, parse_line
from tunekit.data.reading.problems import Problems
from tunekit.data.reading.several import file_names, files_of, row_place
from tunekit.data.reading.source import (
    is_data_set,
    prepare_rows,
    read_file,
    read_row_groups,
    read_source,
    renumbered,
    row_group_sizes,
)
from tunekit.errors import DataError
from tunekit.files.cache_folder import hash_of
from tunekit.recipe.data import Source

SHARD_BYTES = 2**20


@dataclass(frozen=True)
class Shard:
    """Bytes start .. stop-1 of a JSON Lines file, or row group `start` of a Parquet file; with stop = -1, all rows.

    `before`: the number of lines (or rows) of the file before the shard. `file`: the number of the file in the source.
    """

    start: int
    stop: int
    before: int
    file: int = 0


ALL_ROWS = Shard(0, -1, 0)


@dataclass(frozen=True)
class Sharded:
    """A source with its shards. `lines`: the number of lines, if known. `content`: the sha256 of the files, or of the
    name of a hub data set. `names`: the names of the files of a source of several files."""

    source: Source
    files: tuple[DataFile, ...]
    shards: tuple[Shard, ...]
    lines: int | None
    content: str
    names: tuple[str, ...] = ()
    rows: tuple[RawRow, ...] = ()  # rows of a folder, which only name files

    def origin(self, line: int) -> str:
        """The name of the file and the line of a row in it. `line`: the row's number, as `read` counts."""
        return row_place(Path(self.source.path).name, self.names, line)

    def read(self, shard: Shard, problems: Problems) -> Iterator[RawRow]:
        """The raw rows of one shard."""
        if self.rows:
            return iter(self.rows[shard.start : shard.stop])
        if not self.files:
            return read_source(self.source, problems)
        file = self.files[shard.file]
        if shard.stop < 0:
            rows = read_file(file, problems)
        elif file.kind == "parquet":
            rows = read_row_groups(file, problems, [shard.start], shard.before)
        else:
            rows = _read_lines(file, shard, problems)
        rows = renumbered(rows, shard.file + 1) if self.names else rows
        from_start = shard.before == shard.file == 0
        return prepare_rows(rows, self.source, file=str(file.path), from_start=from_start)


def shard_source(source: Source) -> Sharded:
    """The shards of a source, after one pass over its bytes. Raises: DataError if the file cannot be streamed."""
    if is_data_set(source.path):
        name = hashlib.sha256(f"{source.path}@{source.revision}/{source.split}".encode()).hexdigest()
        return Sharded(source, (), (ALL_ROWS,), None, name)
    paths = files_of(source.path)
    if not paths and is_folder(source.path):
        rows = tuple(read_source(source, Problems()))
        shards = tuple(Shard(number, number + 1, number) for number in range(len(rows)))
        return Sharded(source, (), shards, len(rows), names_hash(Path(source.path)), rows=rows)
    names = file_names(source.path)
    files = tuple(map(inspect_file, paths or (Path(source.path),)))
    each = [_shards_of(file, number) for number, file in enumerate(files)]
    content = each[0][2] if not paths else hash_of([digest for _, _, digest in each])
    known = None if any(file.compressed for file in files) else sum(lines for _, lines, _ in each)
    if source.max_rows is not None:
        return Sharded(source, (), (ALL_ROWS,), known and min(known, source.max_rows), content, names)
    return Sharded(source, files, tuple(shard for shards, _, _ in each for shard in shards), known, content, names)


def _shards_of(file: DataFile, number: int) -> tuple[list[Shard], int, str]:
    """The shards, the number of lines and the sha256 of the source's file with this number."""
    if file.kind in ("json", "text"):
        kind = "JSON array" if file.kind == "json" else "text file"
        raise DataError(f"a {kind} cannot be streamed", "write the data as JSON Lines", file=str(file.path))
    shards, lines, content = _scan(file)
    if file.kind == "parquet":
        shards, lines = _row_groups(file)
    if file.compressed or file.kind == "csv":
        shards = (ALL_ROWS,)
    return [replace(shard, file=number) for shard in shards], lines, content


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
