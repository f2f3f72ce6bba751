"""Reads files that may be hostile: regular files of sane size, strict JSON.

Comes in: a path.  Goes out: bytes or a JSON object, or an error that names the file and the fault.  Nothing here
allocates by what a file claims, only by what it is.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunekit.errors import AdapterError, InputError, ModelError, RunFolderError

MAX_JSON_BYTES = 16 * 1024 * 1024
MAX_NUMBER_CHARACTERS = 40


@dataclass(frozen=True)
class FileKind:
    """How files of one kind are read: the error for their faults, whether they may be links, their largest JSON."""

    error: type[InputError]
    follows_links: bool = False
    json_bytes: int = MAX_JSON_BYTES


ADAPTER_FILE = FileKind(AdapterError)
MODEL_FILE = FileKind(ModelError, follows_links=True, json_bytes=100_000_000)  # the hub's cache is made of links
RUN_FILE = FileKind(RunFolderError, json_bytes=100_000_000)


@contextmanager
def opened(path: Path, kind: FileKind = ADAPTER_FILE) -> Iterator[tuple[int, int]]:
    """File number and size of a regular file; never waits for a pipe.

    Raises: the kind's error.
    """
    try:
        links = 0 if kind.follows_links else os.O_NOFOLLOW
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | links)
    except (OSError, ValueError) as error:
        if path.is_symlink() and not kind.follows_links:
            raise kind.error("is a link", "put the file itself there", file=str(path)) from error
        if isinstance(error, FileNotFoundError):
            raise kind.error("is missing", "fetch it, or give a complete folder", file=str(path)) from error
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise kind.error(f"cannot be read: {reason}", file=str(path)) from error
    try:
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode):
            raise kind.error("is not a regular file", "put the file itself there", file=str(path))
        yield number, status.st_size
    finally:
        os.close(number)


def read_small(path: Path, kind: FileKind = ADAPTER_FILE) -> bytes:
    """The whole file, if it is no larger than a configuration may be.

    Raises: the kind's error.
    """
    with opened(path, kind) as (number, size_bytes):
        if size_bytes > kind.json_bytes:
            raise kind.error(f"has {size_bytes} bytes; at most {kind.json_bytes} are read", file=str(path))
        return read_exactly(number, size_bytes, path, kind)


def sha256_of(path: Path, kind: FileKind = ADAPTER_FILE) -> str:
    """Hex digest of a regular file.

    Raises: the kind's error.
    """
    digest = hashlib.sha256()
    with opened(path, kind) as (number, _):
        while piece := os.read(number, 1024 * 1024):
            digest.update(piece)
    return digest.hexdigest()


def read_exactly(number: int, size_bytes: int, path: Path, kind: FileKind) -> bytes:
    """The next bytes of an open file.

    Raises: the kind's error where it ends before.
    """
    pieces, left = [], size_bytes
    while left and (piece := os.read(number, left)):
        pieces.append(piece)
        left -= len(piece)
    if left:
        raise kind.error("ended while it was being read", "try again", file=str(path))
    return b"".join(pieces)


def parse_json(data: bytes, file: str, error: type[InputError] = AdapterError) -> dict[str, Any]:
    """One JSON object: UTF-8, no duplicate keys, no NaN or infinity, no numbers of absurd length, no deep nesting.

    Raises: `error`.
    """
    try:
        value = json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_unique,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_refuse_constant,
        )
    except RecursionError as fault:
        raise error("is nested too deeply", file=file) from fault
    except ValueError as fault:  # also JSONDecodeError and UnicodeDecodeError
        raise error(f"is not valid JSON: {shown(str(fault), 200)}", file=file) from fault
    if not isinstance(value, dict):
        raise error("does not hold a JSON object", file=file)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key '{shown(key)}' stands twice")
        found[key] = value
    return found


def _whole(text: str) -> int:
    if len(text) > MAX_NUMBER_CHARACTERS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {shown(text)} is infinite")
    return number


def _refuse_constant(text: str) -> None:
    raise ValueError(f"the literal {text} is not JSON")


def same(left: object, right: object) -> bool:
    """Equal in type and value: 0 is not False."""
    return type(left) is type(right) and bool(left == right)


def shown(value: object, characters: int = 80) -> str:
    """A foreign value, short and printable."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
    return text if len(text) <= characters else text[: characters - 3] + "..."
