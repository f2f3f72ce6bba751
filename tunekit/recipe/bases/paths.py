"""Type annotations that mark a setting as a path. Code that reads, writes, checks or copies recipes finds the paths in
a recipe by these marks."""

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Literal

from pydantic import Field

_LIKE_PATH = re.compile(r"[./~\\]|[A-Za-z]:[/\\]")  # the beginning of a path (also on Windows), never of a hub name


def is_like_path(text: str) -> bool:
    """Whether a text begins like a path of Linux, macOS or Windows, and so cannot be a hub name."""
    return _LIKE_PATH.match(text) is not None


def cannot_be_hub_name(name: str) -> bool:
    """Whether the name of a base can only be a path: only a path has more than one slash, or ends with .gguf."""
    return is_like_path(name) or name.count("/") > 1 or Path(name).suffix.lower() == ".gguf"


def last_name(path: str) -> str:
    """The last part of a path of Linux, macOS or Windows."""
    is_windows = "\\" in path and "/" not in path
    return (PureWindowsPath if is_windows else PurePosixPath)(path).name


def relative_to(path: Path | str, folder: Path | str = ".") -> str:
    """The path relative to a folder, with forward slashes; a path on a different drive is not changed."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:
        return str(path)


@dataclass(frozen=True)
class PathMark:
    """Marks a setting as a path. `expected`: the kind of file or folder that must exist before a run ("code":
    FILE.py:NAME). "": the run creates the path if it does not exist.

    `endings`: a text with one of these endings is a path. Any other text is a hub name, unless it begins like a path,
    or a file or folder of this name exists. None: the text is always a path.
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
