"""Sources of several data files: a pattern such as data/*.parquet, or a folder of data files. The files are read as one
source, sorted by name. Rows are named by their file and its line."""

import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from tunekit.data.reading.data_file import KINDS
from tunekit.data.reading.folder import WARNING, files_in, is_folder, is_media, media_folder, with_table
from tunekit.errors import DataError, listed
from tunekit.recipe.data import Source

HELD_OUT = ("test", "validation", "valid", "val", "dev", "eval")  # in names of files that are not for training
SHOWN_NAMES = 4
LINES_OF_FILE = (
    2**40
)  # more lines than a file has: the rows of file n of a source, from 1, are numbered from n times this


def is_pattern(path: str) -> bool:
    """Whether a path is a pattern that names several files."""
    may_be = glob.has_magic(path) and os.path.isabs(path) and not os.path.lexists(path)
    return may_be and glob.has_magic(_split(path)[1])


def files_of(path: str) -> tuple[Path, ...]:
    """The files of a source of several files that are not empty, sorted by name; () for any other source.

    Raises: DataError if a pattern names no file, if all files are empty, if the files have several formats, or if a
    folder also contains files of a run, or files whose names or folders say that they are for evaluation.
    """
    files = data_files(path)
    if is_pattern(path) and not files:
        raise DataError("no file matches this pattern", "check data.train and data.eval", file=path)
    if not is_pattern(path):
        _require_no_run(Path(path), files)
    if files:
        _require_one_kind(path, files)
    if not is_pattern(path):
        _require_one_use(Path(path), files)
    filled = tuple(file for file in files if file.stat().st_size)
    if files and not filled:
        raise DataError("all files are empty", "add rows to them, or name other files", file=path)
    return filled


def empty_files_note(path: str) -> list[str]:
    """A warning that names the empty files of a source of several files, if there are any."""
    files = [file for file in data_files(path) if not file.stat().st_size]
    if not files:
        return []
    count = "1 file is" if len(files) == 1 else f"{len(files):,} files are"
    names = listed([relative_name(path, file) for file in files], SHOWN_NAMES)
    return [f"{WARNING}{Path(path).name}: {count} empty: {names}; copy or remove {'it' if len(files) == 1 else 'them'}"]


def relative_name(path: str, file: Path) -> str:
    """The name of a file of a source of several files, with the folders between."""
    return file.relative_to(media_folder(path)).as_posix()


def file_names(path: str) -> tuple[str, ...]:
    """The names of the files of a source of several files; () for any other source."""
    return tuple(relative_name(path, file) for file in files_of(path))


def row_place(name: str, files: Sequence[str], line: int) -> str:
    """The file and the line of a row, as text. `name`: the name of a source of one file. `files`: the names of several
    files. `line`: the number of the row in the source."""
    number, line = divmod(line, LINES_OF_FILE)
    return f"{files[number - 1] if number else name}:{line}"


def includes(path: str, file: Path) -> bool:
    """Whether a file is one of the files of a pattern or of a folder of data files, or will be after it is written."""
    if file.exists():
        status = file.stat()
        return any(os.path.samestat(status, each.stat()) for each in data_files(path))
    folder, pattern = _split(path) if is_pattern(path) else (Path(path), "**/*")
    try:
        parts = file.resolve().relative_to(folder.resolve()).parts
    except ValueError:
        return False
    return _matches(parts, Path(pattern).parts) and (is_pattern(path) or bool(_kind(file) and data_files(path)))


def data_files(path: str) -> list[Path]:
    """The files of a pattern or of a folder of data files, also empty ones, sorted by name; [] for any other source."""
    if is_pattern(path):
        folder, pattern = _split(path)
        files = [folder / match for match in glob.glob(pattern, root_dir=folder, recursive=True)]
        return sorted(file for file in files if file.is_file())
    if not is_folder(path) or with_table(Source(path=path)).path != path:
        return []
    files = []
    for file in files_in(Path(path)):
        if is_media(file.name):
            return []
        files += [file] if _kind(file) else []
    return files


def _split(path: str) -> tuple[Path, str]:
    """The folder of a pattern and the rest. The folder's name can contain brackets, as in `my [old] data/*.jsonl`."""
    folder = media_folder(path)
    return folder, str(Path(path).relative_to(folder))


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path matches a pattern as in glob: `**` is any number of folders, and `*` matches no hidden name."""
    if not pattern or (not parts and pattern[0] != "**"):
        return not parts and not pattern
    visible = bool(parts) and (pattern[0].startswith(".") or not parts[0].startswith("."))
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or (visible and _matches(parts[1:], pattern))
    return visible and fnmatch(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _kind(file: Path) -> str | None:
    """The kind of a data file by its name, without .gz; None for other files."""
    return KINDS.get(Path(file.name.lower().removesuffix(".gz")).suffix)


def _require_one_use(folder: Path, files: Sequence[Path]) -> None:
    """Raises: DataError if only some of a folder's files are for evaluation."""
    inner = [file.relative_to(folder) for file in files]
    held_out = [name for name in inner if _held_out(name)]
    if len({_held_out(name) for name in inner}) > 1:
        what = f"the folder also contains rows for evaluation, as the name {held_out[0]} says"
        within = "train/**/*" if _held_out(held_out[0].parent) else "train*"
        raise DataError(what, f"name files with a pattern: {folder}/{within}{files[0].suffix}", file=str(folder))


def _require_no_run(folder: Path, files: Sequence[Path]) -> None:
    """Raises: DataError if a folder of rows also contains a run, whose metrics would be read as rows."""
    for inner in dict.fromkeys(parent for file in files for parent in file.relative_to(folder).parents):
        if inner.name and (folder / inner / "plan.json").is_file():
            how = f"move the run, or name the files of rows with a pattern, such as {folder}/*.jsonl"
            raise DataError(f"the folder also contains the run {inner}", how, file=str(folder))


def _held_out(name: Path) -> str | None:
    """The word in the name of a file or of its folders that says that the rows are for evaluation; None without it."""
    return next((word for word in re.split(r"[^a-z]+", str(name).lower()) if word in HELD_OUT), None)


def _require_one_kind(path: str, files: Sequence[Path]) -> None:
    if len({_kind(file) for file in files}) > 1:
        folder = os.path.dirname(path) if is_pattern(path) else path
        ((ending, _),) = Counter(file.suffix for file in files).most_common(1)
        what = f"the files have several formats: {listed([file.name for file in files], SHOWN_NAMES)}"
        raise DataError(what, f"name the files of one format with a pattern: {folder}/**/*{ending}", file=path)
