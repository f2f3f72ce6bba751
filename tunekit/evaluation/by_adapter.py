"""Groups evaluation rows by the adapter that a column of each row names. All adapters have the same base."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from tunekit.adapters.folder.config import TEMPLATE_NAME, adapter_in, read_adapter_config
from tunekit.adapters.folder.read import attach_adapter_folder
from tunekit.contracts import Objective
from tunekit.data.encoding.store import ChosenRows, Part
from tunekit.data.reading.first import open_rows
from tunekit.data.reading.folder import media_folder, with_table
from tunekit.data.reading.problems import Problems
from tunekit.data.reading.source import place_of
from tunekit.data.rows import RowSet, written_rows
from tunekit.errors import AdapterError, DataError, InputError, Problem
from tunekit.files.untrusted import printable
from tunekit.model.load import LoadedModel
from tunekit.recipe.data import Source
from tunekit.recipe.reading.suggest import did_you_mean
from tunekit.tuned.model import TunedModel

AdaptersOfRows = dict[int, Path | None]  # a row's number in its source -> its adapter's folder


def rows_by_adapter(rows: RowSet, sources: tuple[Source, ...], column: str) -> dict[Path | None, RowSet]:
    """The evaluation rows of each adapter. The column names the adapter's folder, which is the key. The key None has
    the rows that name no adapter.

    Raises: DataError that lists the rows whose folder contains no adapter; or if no row has the column.
    """
    problems, sources, columns = Problems(), tuple(map(with_table, sources)), dict[str, None]()
    named = [_places(source, rows.objective, column, problems, columns) for source in sources]
    problems.raise_if_any()
    if column not in columns:
        how = did_you_mean(column, columns, "the columns are")
        raise DataError(f"no evaluation row has the column '{column}'", how, key="--adapter-column")
    assert isinstance(rows.evaluation, ChosenRows)  # load_evaluation_rows makes them
    groups: dict[Path | None, list[tuple[Source, Part]]] = {}
    for source, places, part in zip(sources, named, rows.evaluation.parts, strict=True):
        of_rows = [places[number] for number in part.numbers.tolist()]
        for place in dict.fromkeys(of_rows):
            chosen = np.array([other == place for other in of_rows])  # (rows,)
            groups.setdefault(place, []).append((source, replace(part, chosen=part.chosen[chosen])))
    return {place: _chosen(rows, *zip(*pairs, strict=True)) for place, pairs in groups.items()}


def _places(
    source: Source, objective: Objective, column: str, problems: Problems, columns: dict[str, None]
) -> AdaptersOfRows:
    """The adapter's folder of each row of a source. Relative paths start at the folder of the source's file. Adds the
    names of all columns to `columns`."""
    folder, places, raw_rows = (
        media_folder(source.path),
        AdaptersOfRows(),
        open_rows(source, objective.rows.example, problems),
    )
    for number, raw in enumerate(raw_rows[0]):
        columns.update(dict.fromkeys(raw.values))
        name = raw.values.get(column)
        place = adapter_in(Path(os.path.abspath(folder / name))) if isinstance(name, str) and name else None
        if place is None and name not in (None, ""):
            how = "name the folder of an adapter or a run; a relative path starts at the folder of this file"
            problems.add(*place_of(source.path, raw.line), f"'{column}': {printable(name)} contains no adapter", how)
        places[number] = place
    return places


def _chosen(rows: RowSet, sources: Sequence[Source], parts: Sequence[Part]) -> RowSet:
    """A copy of `rows` with only these evaluation rows. `parts`: one part per source."""
    examples = partial(written_rows, sources, parts, rows.objective)
    return replace(rows, evaluation=ChosenRows(parts), evaluation_examples=examples)


def check_adapters(base: LoadedModel, places: list[Path], objective: Objective) -> None:
    """Load each adapter once, so that errors appear before a long evaluation.

    Raises: AdapterError that lists adapters that do not fit the base, and adapters that must be evaluated alone because
    they have a different objective or their own chat template.
    """
    problems: list[Problem] = []
    for place in places:
        try:
            stated = (read_adapter_config(place).objective or {}).get("method", objective.name)
            if stated != objective.name:
                problems.append(Problem(f"was trained with {stated}", "evaluate this adapter alone", str(place)))
            if (place / TEMPLATE_NAME).exists():
                what = "has its own chat template, but all rows are encoded with the same chat template"
                problems.append(Problem(what, "evaluate this adapter alone", str(place)))
            with with_adapter(base, place):
                pass
        except InputError as error:
            problems += error.problems
    if problems:
        raise AdapterError.of(problems)


@contextmanager
def with_adapter(base: LoadedModel, place: Path | None) -> Iterator[TunedModel]:
    """A context manager that yields the base with the adapter attached. If `place` is None, it yields the base
    alone."""
    if place is None:
        yield TunedModel(base, None)
        return
    head_name = base.family.head_name(base.net)
    attach = partial(attach_adapter_folder, base.net, place, head_name=head_name, base_fingerprint=base.fingerprint)
    attached = attach(device=base.device, shares_base=True)
    try:
        yield TunedModel(base, attached)
    finally:
        attached.detach()
