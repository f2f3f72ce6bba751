"""Reads files that may be hostile: regular files of valid size, and strict JSON.

Only the file's real size decides how much memory is allocated, never a number in the file.
"""

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
from tunekit.files.durable import open_file

MAX_JSON_BYTES = 16 * 1024 * 1024
MAX_NUMBER_CHARACTERS = 40
WRITE_AGAIN = "copy the file again, or write it again with the program that made it"


@dataclass(frozen=True)
class FileKind:
    """Rules for reading one kind of file. `error`: the class of all errors. `follows_links`: allow links. `json_bytes`:
    the maximum size of JSON."""

    error: type[InputError]
    follows_links: bool = False
    json_bytes: int = MAX_JSON_BYTES


ADAPTER_FILE = FileKind(AdapterError)
MODEL_FILE = FileKind(ModelError, follows_links=True, json_bytes=100_000_000)  # the hub's cache consists of links
RUN_FILE = FileKind(RunFolderError, json_bytes=100_000_000)
RUN_RECORD = FileKind(RunFolderError, follows_links=True, json_bytes=100_000_000)  # nothing is loaded from it


@contextmanager
def open_regular(path: Path, kind: FileKind = ADAPTER_FILE) -> Iterator[tuple[int, int]]:
    """The descriptor and size of a regular file. A pipe is refused at once, although opening it could block.

    Raises: `kind.error`.
    """
    try:
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
        number = open_file(path, flags, follows_links=kind.follows_links)
    except (OSError, ValueError) as error:
        if path.is_symlink() and not kind.follows_links:
            raise kind.error("is a link", "replace the link by the file itself", file=str(path)) from error
        if isinstance(error, FileNotFoundError):
            raise kind.error("is missing", "fetch it, or give a complete folder", file=str(path)) from error
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise kind.error(f"cannot be read: {reason}", file=str(path)) from error
    try:
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode):
            raise kind.error("is not a regular file", "replace it by a regular file", file=str(path))
        yield number, status.st_size
    finally:
        os.close(number)


def read_small(path: Path, kind: FileKind = ADAPTER_FILE) -> bytes:
    """The bytes of a file that has at most `kind.json_bytes` bytes.

    Raises: `kind.error`.
    """
    with open_regular(path, kind) as (number, size_bytes):
        if size_bytes > kind.json_bytes:
            raise kind.error(f"has {size_bytes} bytes; at most {kind.json_bytes} are read", file=str(path))
        return read_exactly(number, size_bytes, path, kind)


def sha256_of(path: Path, kind: FileKind = ADAPTER_FILE) -> str:
    """Hex digest of a regular file.

    Raises: `kind.error`.
    """
    with open_regular(path, kind) as (number, _), open(number, "rb", closefd=False) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_exactly(number: int, size_bytes: int, path: Path, kind: FileKind) -> bytes:
    """The next bytes of an open file.

    Raises: `kind.error` if it ends too early.
    """
    pieces, left = [], size_bytes
    while left and (piece := os.read(number, left)):
        pieces.append(piece)
        left -= len(piece)
    if left:
        raise kind.error("ended while it was being read", "try again", file=str(path))
    return b"".join(pieces)


def parse_json(data: bytes, file: str, error: type[InputError] = AdapterError) -> dict[str, Any]:
    """One JSON object in UTF-8: no duplicate keys, no NaN or infinity, no extremely long numbers, no deep nesting.

    Raises: `error`.
    """
    try:
        value = json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=unique_pairs,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=refuse_constant,
        )
    except RecursionError as fault:
        raise error("is nested too deeply", WRITE_AGAIN, file=file) from fault
    except ValueError as fault:  # also JSONDecodeError and UnicodeDecodeError
        raise error(f"is not valid JSON: {printable(str(fault), 200)}", WRITE_AGAIN, file=file) from fault
    if not isinstance(value, dict):
        raise error("does not contain a JSON object", WRITE_AGAIN, file=file)
    return value


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object as a dict, for json's object_pairs_hook. Raises: ValueError for a duplicate key."""
    unique = dict(pairs)
    if len(unique) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key '{printable(next(key for key in keys if keys.count(key) > 1))}' appears twice")
    return unique


def _whole(text: str) -> int:
    if len(text) > MAX_NUMBER_CHARACTERS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {printable(text)} is infinite")
    return number


def refuse_constant(text: str) -> None:
    """Refuse NaN and infinity, for json's parse_constant. Raises: ValueError."""
    raise ValueError(f"the literal {text} is not JSON")


def same_value(left: object, right: object) -> bool:
    """Whether `left` and `right` have the same type and value: 0 is not False."""
    return type(left) is type(right) and bool(left == right)


def printable(value: object, characters: int = 80) -> str:
    """A value from a file that may be hostile, shortened and printable."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
    return text if len(text) <= characters else text[: characters - 3] + "..."
