"""Reads files that may be hostile: regular files of sane size, strict JSON, a safetensors header without its data.

Comes in: a path.  Goes out: bytes, a JSON object, tensor shapes; or an AdapterError that names the file and the fault.
Next: folder.py.  Nothing here allocates by what a file claims, only by what it is.
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

from tunekit.errors import AdapterError

MAX_JSON_BYTES = 16 * 1024 * 1024
MAX_NUMBER_CHARACTERS = 40
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
DTYPE_BYTES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
WRONG_STARTS = {  # what a file that is not safetensors often begins with
    b"version https://git-lfs": ("is a git-lfs pointer, not the file itself", "fetch it with git lfs pull"),
    b"<": ("is a web page, not the file itself", "download the file again"),
    b"PK\x03\x04": ("is a pickle archive under another name", "convert it to safetensors where its code cannot harm"),
    b"\x80": ("is a pickle under another name", "convert it to safetensors where its code cannot harm"),
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as a safetensors header describes it."""

    dtype: str
    shape: tuple[int, ...]


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, int]]:
    """File number and size of a regular file that is not a link; never waits for a pipe.

    Raises: AdapterError.
    """
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        if path.is_symlink():
            raise AdapterError("is a link", "put the file itself there", file=str(path)) from error
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise AdapterError(f"cannot be read: {reason}", file=str(path)) from error
    try:
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode):
            raise AdapterError("is not a regular file", "put the file itself there", file=str(path))
        yield number, status.st_size
    finally:
        os.close(number)


def read_small(path: Path) -> bytes:
    """The whole file, if it is no larger than a configuration may be."""
    with opened(path) as (number, size_bytes):
        if size_bytes > MAX_JSON_BYTES:
            raise AdapterError(f"has {size_bytes} bytes; at most {MAX_JSON_BYTES} are read", file=str(path))
        return _read_exactly(number, size_bytes, path)


def sha256_of(path: Path) -> str:
    """Hex digest of a regular file."""
    digest = hashlib.sha256()
    with opened(path) as (number, _):
        while piece := os.read(number, 1024 * 1024):
            digest.update(piece)
    return digest.hexdigest()


def _read_exactly(number: int, size_bytes: int, path: Path) -> bytes:
    pieces, left = [], size_bytes
    while left and (piece := os.read(number, left)):
        pieces.append(piece)
        left -= len(piece)
    if left:
        raise AdapterError("ended while it was being read", file=str(path))
    return b"".join(pieces)


def parse_json(data: bytes, file: str) -> dict[str, Any]:
    """One JSON object: UTF-8, no duplicate keys, no NaN or infinity, no numbers of absurd length, no deep nesting.

    Raises: AdapterError.
    """
    try:
        value = json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_unique,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_refuse_constant,
        )
    except RecursionError as error:
        raise AdapterError("is nested too deeply", file=file) from error
    except ValueError as error:  # also JSONDecodeError and UnicodeDecodeError
        raise AdapterError(f"is not valid JSON: {shown(str(error), 200)}", file=file) from error
    if not isinstance(value, dict):
        raise AdapterError("does not hold a JSON object", file=file)
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


def read_tensor_header(path: Path) -> dict[str, TensorEntry]:
    """Names, types and shapes of a safetensors file, without a byte of its data.

    Checked: header length, strict JSON, types, shapes against byte ranges, ranges against the file's size.
    Raises: AdapterError.
    """
    file = str(path)
    with opened(path) as (number, size_bytes):
        start = _read_exactly(number, min(size_bytes, 32), path)
        for wrong, (what, how) in WRONG_STARTS.items():
            if start.startswith(wrong) and not start[8:9] == b"{":
                raise AdapterError(what, how, file=file)
        length = int.from_bytes(start[:8], "little")
        if size_bytes < 8 or length > size_bytes - 8:
            raise AdapterError(f"is truncated, or no safetensors file ({size_bytes} bytes)", file=file)
        if length > MAX_JSON_BYTES:
            raise AdapterError(f"has a header of {length} bytes; at most {MAX_JSON_BYTES} are read", file=file)
        os.lseek(number, 8, os.SEEK_SET)
        header = parse_json(_read_exactly(number, length, path), file)
    header.pop("__metadata__", None)
    entries = [(*_entry(name, value, file), name) for name, value in header.items()]
    ranges = sorted(entries, key=lambda entry: (entry[0], entry[1], entry[3]))
    offset = 0
    for first, last, _, name in ranges:
        if first != offset:
            raise AdapterError(f"the bytes of '{shown(name)}' overlap others or leave a gap", file=file)
        offset = last
    if offset != size_bytes - 8 - length:
        claimed, real = offset, size_bytes - 8 - length
        raise AdapterError(
            f"is truncated or has extra bytes: {claimed} bytes of tensors, {real} in the file", file=file
        )
    return {name: entry for _, _, entry, name in ranges}


def _entry(name: str, value: Any, file: str) -> tuple[int, int, TensorEntry]:
    """Byte range and entry of one tensor, every number checked."""
    fault = AdapterError(f"the header's entry '{shown(name)}' is malformed", file=file)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise fault
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(shape) <= 8 and len(offsets) == 2
    if not lists or not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in [*shape, *offsets]):
        raise fault
    if dtype not in DTYPE_BYTES:
        raise AdapterError(f"'{shown(name)}' has the unknown type {shown(dtype)}", file=file)
    if math.prod(shape) * DTYPE_BYTES[dtype] != offsets[1] - offsets[0]:
        raise fault
    return offsets[0], offsets[1], TensorEntry(dtype, tuple(shape))


def same(left: Any, right: Any) -> bool:
    """Equal in type and value: 0 is not False."""
    return type(left) is type(right) and bool(left == right)


def shown(value: Any, characters: int = 80) -> str:
    """A foreign value, short and printable."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
    return text if len(text) <= characters else text[: characters - 3] + "..."
