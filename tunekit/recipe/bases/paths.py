"""Marks on settings whose text is a path, so that reading, writing, checking and copying recipes find every path."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field


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
