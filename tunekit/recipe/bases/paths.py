"""Marks on settings whose text is a path, so that reading, writing, checking and copying recipes find every path."""

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Literal

from pydantic import Field

_LIKE_PATH = re.compile(r"[./~\\]|[A-Za-z]:[/\\]")  # how a path begins, of Windows too, and no name on the hub


def is_like_path(text: str) -> bool:
    """Whether a text begins as only a path does, on whatever system it was written."""
    return _LIKE_PATH.match(text) is not None


def last_name(path: str) -> str:
    """The last part of a path of this system, or of Windows."""
    is_windows = "\\" in path and "/" not in path
    return (PureWindowsPath if is_windows else PurePosixPath)(path).name


def relative_to(path: Path | str, folder: Path | str = ".") -> str:
    """The way from a folder to a path, with slashes; the absolute path if there is none (another drive)."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:
        return str(path)


@dataclass(frozen=True)
class PathMark:
    """`expected`: what has to be there before a run; code: FILE.py:NAME; "": the run itself may make it.

    `endings`: a name that ends so is a path; another one is the name of something on the hub, unless it begins like a
    path or exists. None: it can only be a path.
    """

    expected: Literal["", "file", "folder", "code", "adapter", "model", "rows"] = ""
    endings: tuple[str, ...] | None = None


DATA_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".zst", ".arrow")

Text = Annotated[str, Field(min_length=1)]
NewPath = Annotated[Text, PathMark()]
AdapterPath = Annotated[str, PathMark("adapter")]
FilePath = Annotated[Text, PathMark("file")]
FolderPath = Annotated[Text, PathMark("folder")]
CodePath = Annotated[Text, PathMark("code")]
ModelPath = Annotated[Text, PathMark("model", (".gguf",))]
RowsPath = Annotated[Text, PathMark("rows", DATA_ENDINGS)]
TaskPath = Annotated[Text, PathMark("file", (".yaml", ".yml"))]
