"""Chooses the format of a source by its first row.

This module imports neither numpy nor torch, because validate uses it too.
"""

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from types import ModuleType

from tunekit.data.reading.folder import MEDIA, is_media, media_folder
from tunekit.data.reading.lines import RawRow
from tunekit.data.reading.problems import Problems
from tunekit.data.reading.source import place_of, read_source
from tunekit.errors import DataError
from tunekit.formats.example import Example, with_image_folder
from tunekit.formats.fields import Fields, read_weight
from tunekit.formats.media import located
from tunekit.formats.message_images import refuse_unread
from tunekit.formats.preference import is_pair
from tunekit.recipe.data import Source
from tunekit.recipe.reading.names import facts_of, formats_of

MakeExample = Callable[[Fields], Example]
NAMED = "the recipe says so"
ASKED, TOLD = ("question", "query", "input", "prompt"), ("answer", "response", "output", "completion", "target")


def open_rows(source: Source, example: str, problems: Problems) -> tuple[Iterator[RawRow], RawRow, str, str]:
    """(all raw rows of a source, its first row, its format, the reason for this format).

    Raises: DataError if the source has no rows.
    """
    rows = read_source(source, problems)
    first = next(rows, None)
    if first is None:
        problems.raise_if_any()
        raise DataError("the source has no rows", "add rows to it, or name another file", file=source.path)
    format_name, reason = format_of(source, first, example)
    return single_rows(chain([first], rows), format_name), first, format_name, reason


def format_of(source: Source, first: RawRow, example: str) -> tuple[str, str]:
    """The format of a source with this first row, and the reason for this format."""
    if example == "unpaired" and is_pair(first.values) and source.format in ("auto", "unpaired"):
        return "unpaired", "the first row is a pair, and each pair becomes two rows"
    try:
        format_name, reason = choose_format(source.format, first.values, example)
    except DataError as error:
        problem = error.problems[0]
        file, line = place_of(source.path, first.line)
        raise DataError(problem.what, problem.how, file=file, line=line) from None
    return format_name, reason + (" once its columns are renamed" if source.columns and reason != NAMED else "")


def single_rows(rows: Iterable[RawRow], format_name: str) -> Iterator[RawRow]:
    """The rows as the format reads them: `unpaired` splits each preference pair into two rows, one for the chosen and
    one for the rejected answer."""
    for row in rows:
        splits = format_name == "unpaired" and is_pair(row.values)
        yield from [RawRow(row.line, {**row.values, "label": label}) for label in (True, False)] if splits else [row]


def choose_format(named: str, values: Fields, example: str) -> tuple[str, str]:
    """The format of a source and the reason for this format.

    `named`: the format that the recipe names, or "auto". `values`: the first row. `example`: the kind of example that
    the format must give.
    Raises: DataError listing the fields of the formats.
    """
    fitting = formats_of(example)
    if named not in ("auto", *fitting):
        raise DataError(f"the objective does not learn from the format {named}", f"choose from: {', '.join(fitting)}")
    if named != "auto":
        return named, NAMED
    if is_pair(values) and example != "preference":
        what = "the first row has 'chosen' and 'rejected', so the rows are preference pairs"
        raise DataError(what, "choose an objective for preference pairs, such as dpo")
    for name in fitting:
        facts = facts_of("formats", name)
        aliases = aliases_in(facts, values)
        columns = {field: name for name, field in reversed([*aliases.items()]) if name in values}
        columns, required = columns | {field: field for field in values}, facts.REQUIRED
        stands_for = getattr(facts, "STANDS_FOR", {})
        present = [field if field in columns else stands_for.get(field, field) for field in required]
        if columns.keys() >= set(present):
            said = " and ".join(f"'{columns[field]}'" for field in present)
            return name, f"the first row has {said}" if said else "the objective learns from no other format"
    there = ", ".join(f"'{name}'" for name in values) or "no fields"
    wanted = "; ".join(f"{name}: {', '.join(facts_of('formats', name).REQUIRED)}" for name in fitting)
    raise DataError(f"the first row has {there}, which fits no format ({wanted})", _mapped(values, fitting))


def aliases_in(facts: ModuleType, values: Fields) -> Mapping[str, str]:
    """Alternative names of columns that a format accepts for this row: name -> field."""
    aliases: Mapping[str, str] = getattr(facts, "ALIASES", {})
    return facts.aliases_of(values) if hasattr(facts, "aliases_of") else aliases


def read_columns(format_name: str, columns: Iterable[str]) -> list[str]:
    """The columns that the format reads; all columns for a format that keeps the others for rewards."""
    facts, present = facts_of("formats", format_name), dict.fromkeys(columns)
    if getattr(facts, "KEEPS_COLUMNS", False):
        return list(present)
    aliases = [alias for alias, field in aliases_in(facts, present).items() if field not in present]
    return [column for column in present if column in (*facts.FIELDS, *aliases)]


@cache
def _compared_columns(format_name: str, columns: tuple[str, ...], pair: bool) -> list[str]:
    """The columns that identify a row. A pair has the same columns before and after `single_rows`."""
    return [name for name in read_columns(format_name, columns) if not (pair and name == "label")]


def raw_digest(values: Fields, format_name: str) -> int:
    """A 64-bit hash of a row as it was read, of the columns that its format reads. It does not depend on a tokenizer.

    The rows that `single_rows` makes from one pair have equal hashes. A file of a hub data set counts by its bytes or
    name: its folder is in the cache of `datasets`.
    """
    columns = _compared_columns(format_name, tuple(values), format_name == "unpaired" and is_pair(values))
    kept = {name: _without_folder(values[name]) for name in columns if values[name] is not None}
    text = json.dumps(kept, sort_keys=True, default=_as_text)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _without_folder(value: object) -> object:
    if not isinstance(value, Mapping) or value.keys() != {"bytes", "path"}:
        return value
    return Path(str(value["path"])).name if value["bytes"] is None else value["bytes"]


def _as_text(value: object) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


def format_maker(name: str, source: str = "") -> MakeExample:
    """The function that turns a row of the format into an Example with its weight.

    `source`: the path of the source; paths in its rows are relative to its folder. The function can be pickled,
    because worker processes get it; a module cannot.
    """
    module = importlib.import_module(f"tunekit.formats.{name}")
    fields = media_fields(name)
    if not fields:
        return partial(_weighted, module.make_example, tuple(module.FIELDS), media_folder(source))
    return partial(_beside, module.make_example, fields, media_folder(source))


def media_fields(name: str) -> tuple[str, ...]:
    """The fields of the format that contain files or their paths."""
    return getattr(importlib.import_module(f"tunekit.formats.{name}"), "MEDIA", ())


def single_row_maker(name: str) -> Callable[[Fields], Fields]:
    """The function that turns a row, as it was read, into a row that means the same in any file: `single_row` of a
    format that reads several rows from one, else `dict`."""
    return getattr(importlib.import_module(f"tunekit.formats.{name}"), "single_row", dict)


def _beside(make: MakeExample, fields: Sequence[str], folder: Path, row: Fields) -> Example:
    return make(located(row, fields, folder))


def _weighted(make: MakeExample, fields: Sequence[str], folder: Path, row: Fields) -> Example:
    refuse_unread(row, fields)
    example, weight = with_image_folder(make(row), folder), row.get("sample_weight")
    if weight is None:
        return example
    if not isinstance(example, Example):
        how = "remove the column, or rename it"
        raise DataError("'sample_weight' is only supported for rows of text", how)
    return replace(example, weight=read_weight(weight, "sample_weight"))


def columns_meant(values: Fields) -> dict[str, str]:
    """The columns that contain a question and its answer, guessed by name: column -> field; {} without such columns."""
    asked, told = (next((name for name in names if name in values), None) for names in (ASKED, TOLD))
    return {asked: "prompt", told: "completion"} if asked and told else {}


def _mapped(values: Fields, fitting: Sequence[str]) -> str:
    """Advice for a row whose columns fit no format: how to map its columns to fields, or which fields are missing."""
    kind = next((kind for kind in MEDIA if is_media(str(values.get(kind) or ""), kind)), "")
    if set(values) <= {kind, "label"}:  # rows made from the files of a folder, which lack fields
        wanted = [facts_of("formats", name).REQUIRED for name in fitting]
        for field in (field for each in wanted if kind in each for field in each if field not in values):
            folders = ", or make one folder per class with its files" if field == "label" else ""
            return (
                f"put metadata.jsonl into the folder, with a line {{file_name: FILE, {field}: ...}} for each "
                f"file{folders}"
            )
    meant = columns_meant(values)
    if meant and "prompt_completion" in fitting:
        typed = " ".join(f"data.eval.0.columns.{column}={field}" for column, field in meant.items())
        columns = ", ".join(f"{column}: {field}" for column, field in meant.items())
        return f"write {{path: FILE, columns: {{{columns}}}}} in the recipe, or add to --data: {typed}"
    names = [name for name, value in values.items() if isinstance(value, str)]
    columns = f"{names[0]}: prompt, {names[1]}: completion" if len(names) > 1 else "COLUMN: FIELD"
    return f"write {{path: FILE, format: NAME}}, or map columns to fields, such as columns: {{{columns}}}"
