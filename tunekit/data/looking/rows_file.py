"""Writes training rows to a new JSONL, CSV or TSV file, for `data check --fix`, `data rank --keep` and `data mine`."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shlex
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit.basics import JsonObject
from tunekit.data.reading.first import media_fields, open_rows, single_row_maker
from tunekit.data.reading.folder import media_folder, with_table
from tunekit.data.reading.problems import Problems
from tunekit.data.reading.replaced import refuse_to_replace
from tunekit.errors import InputError
from tunekit.files.durable import write_text
from tunekit.files.work_folder import refuse_inside
from tunekit.formats.media import located
from tunekit.recipe.data import Source
from tunekit.recipe.load import LoadedRecipe

if TYPE_CHECKING:  # these import torch
    from tunekit.data.encoding.store import ChosenRows
    from tunekit.data.rows import RowSet


SourceRow = tuple[int, int]  # the number of a source, and the number of a row in it


@dataclass(frozen=True)
class RowsToWrite:
    """Rows of one source, in its format."""

    name: str
    format: str
    source: Source
    rows: Sequence[JsonObject]


SEPARATORS = {".csv": ",", ".tsv": "\t"}


def refuse_rows_file(option: str, name: str, loaded: LoadedRecipe, overwrite: bool | None) -> None:
    """Raises: InputError if rows cannot be written to the file of `option`: for example, it exists or is an input of
    the recipe. `overwrite`: whether an existing file is replaced; None: the command never replaces it."""
    target, how = Path(name), "name a new file"
    if target.suffix not in (".jsonl", *SEPARATORS):
        what = f"{option} {name}: the rows are written as JSONL, CSV or TSV"
        raise InputError(what, f"name a file such as {target.with_suffix('')}.jsonl")
    if not target.absolute().parent.is_dir():
        what = f"{option} {name}: there is no folder {target.parent}"
        raise InputError(what, "make the folder, or name another file")
    refuse_to_replace(option, name, loaded)
    if target.resolve().is_relative_to(Path(loaded.recipe.output.dir).resolve()):
        raise InputError(f"{option} {name} is inside output.dir of the recipe", f"{how} outside of output.dir")
    refuse_inside(target, key=option)
    if os.path.lexists(target) and not (overwrite and target.is_file()):
        more = "" if overwrite is None else ", or add --overwrite to replace it"
        raise InputError(f"{option} {name}: the file exists", f"{how}{more}")


def source_rows(rows: RowSet) -> list[SourceRow]:
    """For each training row, the row of its source: several pieces of a split row have the same."""
    numbers = (part.numbers.tolist() for part in _chosen(rows).parts)
    return [(place, number) for place, some in enumerate(numbers) for number in some]


def training_rows(
    rows: RowSet, sources: Sequence[Source], left_out: Container[SourceRow] = ()
) -> Iterator[RowsToWrite]:
    """The training rows of each source as they were read, without the rows that are left out."""
    example, problems = rows.objective.rows.example, Problems()
    wanted = {each for each in source_rows(rows) if each not in left_out}
    for place, (source, part) in enumerate(zip(sources, _chosen(rows).parts, strict=True)):
        raw, _, format_name, _ = open_rows(with_table(source), example, problems)
        chosen = [row.values for number, row in enumerate(raw) if (place, number) in wanted]
        problems.raise_if_any()
        yield RowsToWrite(part.name, format_name, source, chosen)


def _chosen(rows: RowSet) -> ChosenRows:
    from tunekit.data.encoding.store import ChosenRows  # imports torch

    assert isinstance(rows.train, ChosenRows)  # only streamed rows are different, and the verbs refuse them
    return rows.train


def rows_text(option: str, name: str, parts: Sequence[RowsToWrite]) -> str:
    """The rows as the content of one JSONL, CSV or TSV file. Raises: InputError if such a file cannot contain them."""
    formats = list(dict.fromkeys(part.format for part in parts))
    if len(formats) > 1:
        what = f"{option} writes one file, but the sources have the formats {' and '.join(formats)}"
        raise InputError(what, "remove the sources of other formats from the recipe, for example with ~data.train.1")
    rows, fields = list[JsonObject](), media_fields(formats[0])
    single_row = single_row_maker(formats[0])
    for part in parts:
        folder = media_folder(with_table(part.source).path).absolute()
        values = [row.get(field) for row in part.rows for field in fields]
        if any(isinstance(value, Mapping) and value.get("bytes") is not None for value in values):
            what = f"{option}: the rows of {part.name} contain files, but this file cannot contain files"
            raise InputError(what, f"remove {option}")
        near = folder == Path(name).absolute().parent  # the paths of files are relative to the folder of the rows
        plain = ({key: _plain(value, key, option, part) for key, value in row.items()} for row in part.rows)
        rows += [dict(single_row(row if near else located(row, fields, folder))) for row in plain]
    if (separator := SEPARATORS.get(Path(name).suffix)) is not None:
        return _table_text(option, rows, separator)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _table_text(option: str, rows: Sequence[JsonObject], separator: str) -> str:
    """The rows as a table with a header. Raises: InputError for a value that is neither text nor a number."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    wrong = next((column for row in rows for column, value in row.items() if isinstance(value, dict | list)), None)
    if wrong is not None:
        what = f"{option}: the column '{wrong}' contains lists or objects, but a table cannot contain them"
        raise InputError(what, "name a .jsonl file")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", delimiter=separator, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _plain(value: object, key: str, option: str, part: RowsToWrite) -> object:
    """A value of a Parquet file as a value of JSON: dates and decimals become text, and NaN becomes null. Raises:
    InputError for bytes."""
    if isinstance(value, bytes):
        what = f"{option}: the column '{key}' of {part.name} contains bytes, but this file cannot contain bytes"
        raise InputError(what, f"remove the column, or remove {option}")
    if isinstance(value, Mapping):
        return {str(name): _plain(inner, key, option, part) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, key, option, part) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


def write_rows_file(option: str, name: str, parts: Sequence[RowsToWrite]) -> list[str]:
    """Write the rows to one file. Returns notes: how to train on the file, and settings of the sources that are not in
    it. Raises: InputError if one JSONL file cannot contain the rows."""
    write_text(Path(name), rows_text(option, name, parts))
    formats = [part.format for part in parts]
    named = any(part.source.format != "auto" for part in parts)
    keys = shlex.join([f"data.train={name}", *([f"data.train.0.format={formats[0]}"] if named else [])])
    notes = [f"train on them with {keys}"]
    for part in parts:
        if part.source.max_rows is not None:
            unread = f"max_rows ({part.source.max_rows:,}) left some rows unread; these are not in {name}"
            notes.append(f"{part.name}: {unread}")
        if part.source.weight != 1:
            notes.append(f"{part.name}: weight ({part.source.weight:g}) is not in {name}, which contains each row once")
    return notes
