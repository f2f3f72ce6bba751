"""Sources of several data files: a pattern such as data/*.parquet, or a folder of data files. The files are read as one
source, sorted by name, and the numbers of the rows continue from file to file."""

import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tunekit.data.reading.data_file import KINDS
from tunekit.data.reading.folder import files_in, is_folder, is_media, with_table
from tunekit.errors import DataError, listed
from tunekit.recipe.data import Source

HELD_OUT = ("test", "validation", "valid", "val", "dev", "eval")  # in names of files that are not for training
SHOWN_NAMES = 4


def is_pattern(path: str) -> bool:
    """Whether a path is a pattern that names several files."""
    return glob.has_magic(path) and os.path.isabs(path) and not os.path.lexists(path)


def files_of(path: str) -> tuple[Path, ...]:
    """The files of a source of several files, sorted by name; () for any other source.

    Raises: DataError if a pattern names no file, if the files have several formats, or if a folder also contains files
    whose names say that they are for evaluation.
    """
    if is_pattern(path):
        files = sorted(Path(match) for match in glob.glob(path, recursive=True) if os.path.isfile(match))
        if not files:
            raise DataError("no file matches this pattern", "check data.train and data.eval", file=path)
        _require_one_kind(path, files)
        return tuple(files)
    if not is_folder(path) or with_table(Source(path=path)).path != path:
        return ()
    inside = files_in(Path(path))
    files = [file for file in inside if _kind(file)]
    if not files or any(is_media(file.name) for file in inside):
        return ()
    _require_one_kind(path, files)
    if len({_held_out(file) for file in files}) > 1:
        named = next(file.name for file in files if _held_out(file))
        what = f"the folder also contains rows for evaluation, as the name {named} says"
        raise DataError(what, f"name files with a pattern: {path}/train*{files[0].suffix}", file=path)
    return tuple(files)


def _kind(file: Path) -> str | None:
    """The kind of a data file by its name, without .gz; None for other files."""
    return KINDS.get(Path(file.name.lower().removesuffix(".gz")).suffix)


def _held_out(file: Path) -> str | None:
    """The word in a file's name that says that its rows are for evaluation; None if there is none."""
    return next((word for word in re.split(r"[^a-z]+", file.stem.lower()) if word in HELD_OUT), None)


def _require_one_kind(path: str, files: Sequence[Path]) -> None:
    if len({_kind(file) for file in files}) > 1:
        folder = os.path.dirname(path) if is_pattern(path) else path
        ((ending, _),) = Counter(file.suffix for file in files).most_common(1)
        what = f"the files have several formats: {listed([file.name for file in files], SHOWN_NAMES)}"
        raise DataError(what, f"name the files of one format with a pattern: {folder}/**/*{ending}", file=path)
