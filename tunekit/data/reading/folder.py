"""Reads folders as sources: with a table of the files (metadata.jsonl, .csv or .parquet), or one folder per class."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from glob import has_magic
from pathlib import Path

from tunekit.data.reading.data_file import KINDS
from tunekit.data.reading.lines import RawRow
from tunekit.errors import DataError, listed
from tunekit.recipe.data import Source

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "metadata.tsv", "metadata.json")
SAVED = "state.json"  # a file in folders that `datasets` writes with save_to_disk
MEDIA = {
    "audio": (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au"),
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
}
# Image formats that are not read: the user must convert the files.
CONVERTED = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".dng", ".raw", ".cr2", ".nef", ".arw")
SHOWN_NAMES = 4
WARNING = "warning: "
HOW = f"name a file, or files with a pattern such as FOLDER/*.jsonl, or put {TABLES[0]} or one folder per class into it"


def is_folder(path: str) -> bool:
    """Whether a source is a folder of files. A folder saved by `datasets` is a data set instead."""
    try:
        return os.path.isdir(path) and not is_saved(path)
    except ValueError:
        return False


def is_saved(path: str) -> bool:
    """Whether `datasets` wrote this folder with save_to_disk."""
    return os.path.isabs(path) and os.path.isfile(os.path.join(path, SAVED))


def with_table(source: Source) -> Source:
    """The source; if it is a folder with a table, the source with the path of the table."""
    if not is_folder(source.path):
        return source
    tables = [name for name in TABLES if os.path.isfile(os.path.join(source.path, name))]
    if len(tables) > 1:
        raise DataError(
            f"the folder contains {' and '.join(tables)}", "keep only one of these tables", file=source.path
        )
    return source.model_copy(update={"path": os.path.join(source.path, tables[0])}) if tables else source


def media_folder(path: str) -> Path:
    """The folder to which paths in the rows of a source are relative. For a pattern such as data/**/*.jsonl: data."""
    if os.path.isdir(path):
        return Path(path)
    folders = Path(path).parents
    return next((folder for folder in folders if not has_magic(str(folder)) or folder.is_dir()), Path(path).parent)


def is_media(name: str, kind: str | None = None) -> bool:
    """Whether a file is a recording or an image, by its name. `kind`: accept only "audio" or only "image"."""
    return any(name.lower().endswith(endings) for each, endings in MEDIA.items() if kind in (None, each))


def read_classes(folder: Path) -> Iterator[RawRow]:
    """One row for each recording or image of a folder, sorted. The name of the file's subfolder, if any, is the label.

    Raises: DataError if there is no such file, or if recordings and images are mixed.
    """
    kinds = {ending: kind for kind, endings in MEDIA.items() for ending in endings}
    files = [(kinds[place.suffix.lower()], place) for place in files_in(folder) if place.suffix.lower() in kinds]
    if not files:
        what = "this folder contains no data files, no recordings and no images"
        others = passed_over(folder)
        what += "" if others is None else f" ({others.removeprefix(WARNING)})"
        raise DataError(what, HOW, file=str(folder))
    if len({kind for kind, _ in files}) > 1:
        raise DataError("the folder contains both recordings and images", "keep only one kind", file=str(folder))
    for number, (kind, place) in enumerate(files, 1):
        inner = place.relative_to(folder)
        yield RawRow(number, {kind: str(inner), **({"label": inner.parts[0]} if len(inner.parts) > 1 else {})})


def files_in(folder: Path) -> Iterator[Path]:
    """The files in the folder and its subfolders, sorted, without hidden files."""
    for inner in sorted(folder.iterdir()):
        if not inner.name.startswith("."):
            places = sorted(inner.rglob("*")) if inner.is_dir() else [inner]
            yield from (place for place in places if not place.name.startswith(".") and place.is_file())


def passed_over(folder: Path, read: Iterable[Path] = ()) -> str | None:
    """A note that lists the unread files of a folder: they are neither recordings nor images, and not in `read`. None
    if all files are read."""
    known = set(read)
    others = [place for place in files_in(folder) if not (is_media(place.name) or place in known)]
    rows = [place for place in others if place.suffix.lower() in KINDS.keys() - {".txt"} and place.name not in TABLES]
    if not others:
        return None
    if rows:
        names = listed([place.relative_to(folder) for place in rows], SHOWN_NAMES)
        how = f"to train on them, name the file, such as {rows[0]}"
        return f"{WARNING}{folder.name}: the rows of {names} are not read, because the folder contains media; {how}"
    names = listed([place.relative_to(folder) for place in others], SHOWN_NAMES)
    foreign = sorted({place.suffix.lower() for place in others} & set(CONVERTED))
    how = f"; convert {' and '.join(foreign)} to .png or .jpg" if foreign else ""
    count = "1 file is" if len(others) == 1 else f"{len(others):,} files are"
    start = WARNING if foreign else ""
    return f"{start}{folder.name}: {count} not read, because the format is not supported: {names}{how}"


def names_hash(folder: Path) -> str:
    """sha256 of the file names in the rows of read_classes."""
    names = [str(row.values) for row in read_classes(folder)]
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
