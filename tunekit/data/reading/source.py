"""Reads one source of the recipe row by row: a file, a folder, or a data set of the hub.

Only this module imports pyarrow and datasets, inside the functions that use them.
"""

from __future__ import annotations

import csv
import io
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import compress, islice
from pathlib import Path
from typing import Any, Protocol

from tunekit.data.reading.class_names import class_names, stored_class_names, with_class_names
from tunekit.data.reading.data_file import COPY, KINDS, DataFile, inspect_file, open_bytes
from tunekit.data.reading.folder import is_folder, is_saved, read_classes, with_table
from tunekit.data.reading.lines import RawRow, read_json_array, read_json_lines, read_text
from tunekit.data.reading.problems import Problems
from tunekit.data.reading.several import LINES_OF_FILE, files_of
from tunekit.errors import DataError
from tunekit.formats.fields import Fields
from tunekit.recipe.data import Source

# Separators of files that are wrongly called .csv -> advice
SEPARATORS = {";": "save the file with commas between columns", "\t": "name the file .tsv"}
TOOLS = ("tools", "tool_calls")  # fields that contain tools
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def is_hub_name(path: str) -> bool:
    """Whether a path names a data set of the hub.

    Local paths are already absolute, or begin with a dot. So a file in the working directory with the same name is
    not read.
    """
    return bool(_HUB_NAME.fullmatch(path)) and Path(path).suffix.lower() not in (*KINDS, ".gz")


def is_data_set(path: str) -> bool:
    """Whether the `datasets` library reads this source: from the hub, or from a folder that it wrote."""
    return is_hub_name(path) or is_saved(path)


def read_source(source: Source, problems: Problems) -> Iterator[RawRow]:
    """The rows of a source in order, at most max_rows, with renamed columns.

    Raises: DataError if the source cannot be read at all.
    """
    source = with_table(source)
    files = () if is_data_set(source.path) else files_of(source.path)
    rows = _all_rows(source, files, problems)
    if source.max_rows is not None:
        draws = source.draw_seed is not None
        rows = compress(rows, _drawn(source, files)) if draws else islice(rows, source.max_rows)
    return prepare_rows(rows, source, file=str((*files, source.path)[0]))


def _all_rows(source: Source, files: Sequence[Path], problems: Problems) -> Iterator[RawRow]:
    """`files`: the files of a source of several files."""
    if is_data_set(source.path):
        return _read_hub(source)
    if files:
        return _read_files(files, problems)
    if is_folder(source.path):
        return read_classes(Path(source.path))
    return read_file(inspect_file(Path(source.path)), problems)


def _read_files(files: Sequence[Path], problems: Problems) -> Iterator[RawRow]:
    """The rows of several files. The line numbers of file n, counted from 1, begin at n * LINES_OF_FILE."""
    for number, path in enumerate(files, 1):
        yield from renumbered(read_file(inspect_file(path), problems), number)


def renumbered(rows: Iterable[RawRow], number: int) -> Iterator[RawRow]:
    """The rows of file `number` of a source, counted from 1, with the numbers that they have in the source."""
    return (RawRow(number * LINES_OF_FILE + row.line, row.values) for row in rows)


def place_of(path: str, line: int) -> tuple[str, int]:
    """The file and the line of a row, for an error. `line`: its number in the source."""
    number, line = divmod(line, LINES_OF_FILE)
    return (str(_cached_files(path)[number - 1]) if number else path), line


@lru_cache(maxsize=8)
def _cached_files(path: str) -> tuple[Path, ...]:
    """`files_of`. Cached because a source can have many wrong rows."""
    return files_of(path)


def _drawn(source: Source, files: Sequence[Path]) -> Iterable[bool]:
    """For each row of the source: whether it is among the max_rows rows that are drawn with equal probability."""
    from tunekit.data.batching.order import permutation  # imports numpy, which is not needed to read a recipe

    order = permutation(_count_rows(source, files), "max_rows", str(source.draw_seed))
    chosen = order < 0  # (rows,)
    chosen[order[: source.max_rows]] = True
    return chosen.tolist()


def _count_rows(source: Source, several: Sequence[Path]) -> int:
    """The number of rows of a source, counted by reading them. Raises: DataError for a source that is streamed over
    the network.
    """
    if is_data_set(source.path):
        if source.streaming and not is_saved(source.path):
            what = "max_rows draws from all rows, but the rows of a streamed data set of the hub cannot be counted"
            raise DataError(what, "write draw_seed: null to take the first rows, or streaming: false", file=source.path)
        return len(_load_hub(source, streaming=False))
    paths = several or (() if is_folder(source.path) else (Path(source.path),))
    files = [inspect_file(path) for path in paths]
    if files and files[0].kind == "parquet":
        return sum(sum(row_group_sizes(file)) for file in files)
    return sum(1 for _ in _all_rows(source, several, Problems()))


def prepare_rows(rows: Iterable[RawRow], source: Source, *, file: str, from_start: bool = True) -> Iterator[RawRow]:
    """The rows with renamed columns, and without the nulls that Parquet adds to tools. `file`: the source's path, or
    its first file. `from_start`: whether the rows begin with the first row of the source.

    Raises: DataError if the first row of the source lacks a column that `columns` names.
    """
    adds_nulls = is_data_set(file) or Path(file).suffix.lower() == ".parquet"
    for index, row in enumerate(rows):
        if index == 0 and from_start:
            _check_columns(source, row)
        values = rename_columns(row.values, source.columns) if source.columns else row.values
        if adds_nulls:
            values = {name: without_nulls_in_tools(value, name in TOOLS) for name, value in values.items()}
        yield RawRow(row.line, values)


def without_nulls_in_tools(value: object, inside: bool) -> object:
    """The value, without the null fields of tools and tool calls: Parquet gives each row the fields of all rows.
    `inside`: whether the value belongs to a tool."""
    if isinstance(value, dict):
        parts = {name: without_nulls_in_tools(part, inside or name in TOOLS) for name, part in value.items()}
        return {name: part for name, part in parts.items() if part is not None or not inside}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [without_nulls_in_tools(part, inside) for part in value]
    return value


def rename_columns(values: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """The row with renamed columns. A renamed column replaces a column that already has its new name."""
    renamed = {columns[name]: value for name, value in values.items() if name in columns}
    kept = {name: value for name, value in values.items() if name not in columns and name not in renamed}
    return {**kept, **renamed}


def _check_columns(source: Source, row: RawRow) -> None:
    absent = [name for name in source.columns if name not in row.values]
    if absent:
        there = ", ".join(f"'{name}'" for name in row.values)
        turned = {column: field for field, column in source.columns.items()}
        written = ", ".join(f"{column}: {field}" for column, field in turned.items())
        what = f"data.train[].columns maps the column '{absent[0]}', which does not exist; the first row has {there}"
        how = f"columns maps columns of the file to fields of the format; write columns: {{{written}}}"
        how = how if set(turned) <= set(row.values) else "name a column that the file has"
        file, line = place_of(source.path, row.line)
        raise DataError(what, how, file=file, line=line)


def read_file(file: DataFile, problems: Problems) -> Iterator[RawRow]:
    """The rows of a file, read as its kind requires."""
    readers = {
        "jsonl": read_json_lines,
        "json": read_json_array,
        "csv": _read_csv,
        "parquet": read_row_groups,
        "text": read_text,
    }
    return readers[file.kind](file, problems)


def _read_csv(file: DataFile, problems: Problems) -> Iterator[RawRow]:
    """The rows of a CSV file, with the header's names as columns. A row's line number is its first line."""
    name = str(file.path)
    tabs = ".tsv" in [suffix.lower() for suffix in file.path.suffixes]
    csv.field_size_limit(sys.maxsize)
    with open_bytes(file) as raw:
        stream = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
        reader = csv.reader(stream, delimiter="\t" if tabs else ",", strict=True)
        header: list[str] | None = None
        start = 1
        while True:
            try:
                cells = next(reader, None)
            except UnicodeDecodeError as error:
                problems.add(name, _line_of_bad_byte(file), f"not UTF-8: {error.reason}", "save the file as UTF-8")
                return
            except (csv.Error, OSError, EOFError) as error:
                reason = "a quote is never closed" if "end of data" in str(error) else error
                what = f"not valid CSV: {reason}; this row and all rows after it are not read"
                problems.add(name, start, what, "close the quotes, and write each quote inside a quoted text twice")
                return
            if cells is None:
                return
            line, start = start, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _check_header(cells, name)
            elif len(cells) != len(header):
                what = f"the row has {len(cells)} fields, but the header has {len(header)}"
                problems.add(name, line, what, "quote commas in text")
            else:
                yield RawRow(line, dict(zip(header, cells, strict=True)))


def _line_of_bad_byte(file: DataFile) -> int:
    """The number of the first line that is not UTF-8."""
    with open_bytes(file) as stream:
        for number, raw in enumerate(stream, 1):
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def _check_header(cells: list[str], name: str) -> list[str]:
    twice = sorted({cell for cell in cells if cells.count(cell) > 1})
    for separator, how in SEPARATORS.items():
        if len(cells) == 1 and separator in cells[0]:
            raise DataError(f"the columns are separated by {separator!r}, not by commas", how, file=name, line=1)
    if twice or "" in cells:
        named = twice and twice[0]
        what = f"the header names '{named}' twice" if named else "the header has a column without a name"
        raise DataError(what, "give each column a different name", file=name, line=1)
    return cells


def read_row_groups(
    file: DataFile, problems: Problems, groups: list[int] | None = None, before: int = 0
) -> Iterator[RawRow]:
    """The rows of a Parquet file. `groups`: only these row groups. `before`: the number of rows before these groups."""
    import pyarrow
    import pyarrow.parquet

    number = before
    try:
        with pyarrow.parquet.ParquetFile(file.path) as parquet:
            names = stored_class_names(parquet.schema_arrow.metadata)
            for batch in parquet.iter_batches(batch_size=1000, row_groups=groups):
                for values in batch.to_pylist():
                    number += 1
                    yield RawRow(number, with_class_names(values, names) if names else values)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        problems.add(str(file.path), number + 1, f"the Parquet file is damaged: {str(error).splitlines()[0]}", COPY)


def row_group_sizes(file: DataFile) -> list[int]:
    """The number of rows in each row group of a Parquet file. Raises: DataError if the file is damaged."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file.path) as parquet:
            return [parquet.metadata.row_group(index).num_rows for index in range(parquet.num_row_groups)]
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"the Parquet file is damaged: {str(error).splitlines()[0]}", COPY, file=str(file.path)
        ) from None


def _read_hub(source: Source) -> Iterator[RawRow]:
    """The rows of a hub data set; a streamed data set is read over the network while it is used."""
    rows = _load_hub(source, streaming=source.streaming)
    features = getattr(rows, "features", None)
    names = class_names(None if features is None else features.to_dict())
    try:
        for number, values in enumerate(rows, 1):
            yield RawRow(number, with_class_names(dict(values), names))
    except Exception as error:  # the network, or a damaged file
        raise _hub_error(source, error) from error


class HubRows(Protocol):
    """The methods of a `datasets` data set that are used here."""

    _fingerprint: str

    def __iter__(self) -> Iterator[Fields]:
        """The rows."""

    def __len__(self) -> int:
        """The number of rows; not available for a streamed data set."""

    def cast_column(self, name: str, feature: object) -> HubRows:
        """The data set, with the feature of a column changed."""


def hub_fingerprint(source: Source) -> str:
    """The fingerprint that `datasets` computes from the data set's content."""
    return str(_load_hub(source, streaming=False)._fingerprint)


def _load_hub(source: Source, *, streaming: bool) -> HubRows:
    """The data set; without a network, the copy in the cache of `datasets`. Raises: DataError."""
    import datasets

    datasets.disable_progress_bars()
    path = source.path
    if Path(path).exists() and not is_saved(path):
        path = f"hf://datasets/{path}"  # otherwise `datasets` would read a local folder with this name
    printed = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # else every retry is logged
    try:
        if is_saved(path):
            rows = datasets.load_from_disk(path)
            rows = rows.to_iterable_dataset() if streaming else rows
        else:
            rows = datasets.load_dataset(path, split=source.split, revision=source.revision, streaming=streaming)
        return _undecoded(rows)
    except Exception as error:  # any error of the loaders, the hub or the network
        raise _hub_error(source, error) from error
    finally:
        logging.disable(printed)


def _undecoded(rows: HubRows) -> HubRows:
    """The data set, with recordings and images undecoded, as {bytes, path}."""
    import datasets

    for name, feature in (getattr(rows, "features", None) or {}).items():
        if isinstance(feature, datasets.Audio | datasets.Image):
            rows = rows.cast_column(name, type(feature)(decode=False))
    return rows


def _hub_error(source: Source, error: Exception) -> DataError:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    first = lines[0]
    if isinstance(error, ImportError):
        from tunekit.machine.versions import error_words

        first = error_words(error)
    how = "check path, split, revision and network; without a network, only data sets in the cache can be read"
    return DataError(f"there is no such file, and the hub's data set cannot be loaded: {first}", how, file=source.path)
