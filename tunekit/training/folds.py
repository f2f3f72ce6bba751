"""The folds of a cross-validation: the rows of the recipe's sources are divided into files with about equally many
rows."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby
from pathlib import Path

from tunekit.data.reading.first import media_fields, open_rows
from tunekit.data.reading.folder import media_folder
from tunekit.data.reading.problems import Problems
from tunekit.data.reading.source import place_of, read_source
from tunekit.errors import DataError, RunFolderError
from tunekit.files.durable import make_folder, write_text
from tunekit.formats.fields import Fields
from tunekit.formats.media import located
from tunekit.recipe.data import Source
from tunekit.recipe.reading.trial_recipes import FOLDS, fold_file
from tunekit.recipe.recipe import Recipe
from tunekit.recipe.sweep import SweepSection

LABEL = "label"  # the field whose values are divided evenly


@dataclass(frozen=True)
class _Row:
    """A row of a source as text. `group`: all rows with the same group are put into the same fold."""

    source: int
    group: str
    label: str
    text: str


def write_folds(recipe: Recipe, sweep: SweepSection, folder: Path, resume: bool) -> None:
    """Write one file for each source and fold below `folder`. Every fold gets about equally many rows of each source.
    If rows have a field `label`, the rows of each label are divided equally too.

    Identical rows get into the same fold. If sweep.fold_group names a column, rows with equal values in this column
    also do. Ties are broken at random, by training.seed.
    Raises: DataError if rows cannot be read or divided; RunFolderError if the sweep that is resumed had different rows.
    """
    sources, column, count = recipe.data.train, sweep.fold_group, sweep.folds or 1
    example = recipe.objective.example
    rows = [row for number, source in enumerate(sources) for row in _rows(number, source, example, column)]
    folds = _fold_of_groups(rows, count, recipe.training.seed)
    texts: dict[Path, str] = {}
    for number, source in enumerate(sources):
        for fold in range(1, count + 1):
            lines = [row.text for row in rows if row.source == number and folds[row.group] == fold]
            if not lines:
                what = f"too few different {'rows' if column is None else f'values of {column}'} for {count} folds"
                raise DataError(what, "lower sweep.folds", file=source.path, key="sweep.folds")
            texts[Path(fold_file(str(folder), number, fold))] = "".join(f"{line}\n" for line in lines)
    if not (folder / FOLDS).is_dir():
        make_folder(folder / FOLDS)
    for path in [] if resume else [old for old in (folder / FOLDS).glob("source-*-fold-*.jsonl") if old not in texts]:
        path.unlink()  # of a sweep that was refused before its first run
    for path, text in texts.items():
        _write(path, text, resume)


def fold_notes(recipe: Recipe, sweep: SweepSection) -> list[str]:
    """Notes that explain how the trials of a sweep use the folds."""
    kept = "" if sweep.fold_group is None else f"; rows with equal values of {sweep.fold_group} are in the same fold"
    evaluation = "" if recipe.data.eval is None else "; data.eval is not used"
    return [f"each trial trains without one of {sweep.folds} folds, and is evaluated on this fold{evaluation}{kept}"]


def _write(path: Path, text: str, resume: bool) -> None:
    """Write the file of a fold, unless it already has this text. Raises: RunFolderError if a resumed sweep has a
    different text."""
    exists = path.is_file()
    if exists and path.read_bytes() == text.encode():
        return
    if exists and resume:
        what = f"{path}: the rows of this fold differ from the rows in the interrupted sweep"
        raise RunFolderError(what, "restore data.train and sweep.folds, or choose another output.dir")
    write_text(path, text)


def _rows(number: int, source: Source, example: str, column: str | None) -> Iterator[_Row]:
    """The rows of a source. `example`: the class of the objective's examples. Raises: DataError with the problems of
    all rows."""
    problems, folder = Problems(), media_folder(source.path)
    files = media_fields(open_rows(source, example, Problems())[2])
    for row in read_source(source, problems):
        try:
            text = json.dumps(located(row.values, files, folder), allow_nan=False)
        except (TypeError, ValueError) as error:
            how = "write paths of recordings and images into the rows, or use sweep.seeds instead of sweep.folds"
            problems.add(
                *place_of(source.path, row.line), f"the row has a value that cannot be written as JSON: {error}", how
            )
            continue
        if column is not None and column not in row.values:
            problems.add(*place_of(source.path, row.line), f"has no column '{column}'", "correct sweep.fold_group")
            continue
        group = _digest(_text(row.values)) if column is None else _value_text(row.values[column])
        yield _Row(number, group, json.dumps(row.values.get(LABEL), default=str), text)
    problems.raise_if_any()


def _text(values: Fields) -> str:
    """Rows with equal values have the same text, whatever the order of their columns."""
    return json.dumps(values, sort_keys=True, default=str)


def _value_text(value: object) -> str:
    """The number 1 of a JSON file and the text 1 of a CSV file have the same text."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _digest(*parts: object) -> str:
    return blake2b("\x1f".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def _fold_of_groups(rows: Iterable[_Row], count: int, seed: int) -> dict[str, int]:
    """Returns the fold of each group of rows; folds are numbered from 1. Groups are assigned one source and label at a
    time, largest groups first, and in random order if sizes are equal. Each group goes to the fold that has the fewest
    rows of this source."""
    sizes, first = Counter[str](), dict[str, _Row]()
    for row in rows:
        sizes[row.group] += 1
        first.setdefault(row.group, row)

    def order(row: _Row) -> tuple[int, str, int, str]:
        return row.source, row.label, -sizes[row.group], _digest("fold", seed, row.group)

    folds: dict[str, int] = {}
    for _, members in groupby(sorted(first.values(), key=order), key=lambda row: row.source):
        filled = dict.fromkeys(range(1, count + 1), 0)
        for row in members:
            fold = min(filled, key=lambda number: (filled[number], number))
            folds[row.group] = fold
            filled[fold] += sizes[row.group]
    return folds
