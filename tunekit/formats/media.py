"""Recordings and images in rows: a path, or {"bytes": ..., "path": ...}, which is how `datasets` stores files that are
not decoded.

The files are read later.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunekit.errors import DataError
from tunekit.formats.fields import Fields, check_text, read_value

AUDIO_ALIASES = dict.fromkeys(("file_name", "path", "file", "audio_filepath"), "audio")
AUDIO_FIELDS = ("audio", *AUDIO_ALIASES)  # columns that may contain a recording


@dataclass(frozen=True)
class Media:
    """A recording or image of a row: its path, or the bytes of the file with the original path."""

    path: str
    data: bytes | None = None

    @property
    def name(self) -> str:
        """The file name, for messages and previews."""
        return os.path.basename(self.path) or "without a name"

    def located(self, folder: Path) -> Media:
        """The file with its path relative to `folder`; unchanged if it has bytes."""
        return self if self.data is not None else Media(str(folder / os.path.expanduser(self.path)))


def read_media(row: Fields, field: str) -> Media:
    """The file in the column `field`."""
    value = read_value(row, field)
    if isinstance(value, Mapping) and {"array", "sampling_rate"} <= set(value):
        what = f"'{field}' is decoded already"
        raise DataError(what, "give the undecoded file: a path, or {bytes, path}")
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (None, value)
    if data is not None and not isinstance(data, bytes):
        raise DataError(f"the bytes of '{field}' have the type {type(data).__name__}", "store the file's bytes")
    if data is not None:
        return Media(str(path or ""), data)
    text = check_text(path, field)
    if not text.strip():
        raise DataError(f"'{field}' is empty", "name a file, or leave the row out")
    return Media(text)


def renamed(row: Fields, aliases: Mapping[str, str]) -> Fields:
    """The row with alternative column names replaced by the standard names. A column that has a standard name already
    has priority."""
    return {**row, **{aliases[name]: value for name, value in row.items() if aliases.get(name, name) not in row}}


def located(row: Fields, fields: Sequence[str], folder: Path) -> Fields:
    """The row with the paths in these columns resolved relative to `folder`."""
    resolved = dict(row)
    for field in fields:
        value = row.get(field)
        if isinstance(value, str) and value.strip():
            resolved[field] = str(folder / os.path.expanduser(value))
        elif isinstance(value, Mapping) and value.get("bytes") is None and isinstance(value.get("path"), str):
            resolved[field] = {**value, "path": str(folder / value["path"])}
    return resolved
