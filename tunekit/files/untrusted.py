"""Reads files that may be hostile: regular files of sane size, strict JSON, a safetensors header without its data.

Comes in: a path.  Goes out: bytes, a JSON object, tensor shapes; or an AdapterError that names the file and the fault.
Next: folder.py.  Nothing here allocates by what a file claims, only by what it is.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import regex

from tunekit.errors import AdapterError

MAX_JSON_BYTES = 16 * 1024 * 1024
MAX_NUMBER_CHARACTERS = 40
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
DTYPE_BYTES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
MAX_PATTERN_CHARACTERS = 100_000
MAX_GROUPS = 100  # inside each other
MAX_COPIES = 1000  # of a part that counted repeats write out
MAX_OPEN_REPEATS, MAX_OPEN_DEPTH = 16, 2  # in a pattern, and inside each other
PATTERN_PIECE = re.compile(
    r"(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])|(?P<group>\((?:\?(?:P<\w+>|<[=!]|[:=!]))?)|(?P<close>\))"
    r"|(?P<repeat>(?:[*+?]|\{(?:\d+(?:,\d*)?|,\d+)\})[?+]?)|(?P<between>\|)|(?P<one>\\.|.)",
    re.DOTALL,
)
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


@lru_cache(maxsize=1024)
def compile_pattern(text: str, template: str = "{}") -> regex.Pattern[str]:
    """A regular expression of Python's syntax and meaning, put into `template`, for the matcher of the package `regex`.

    What explodes is refused by its structure alone: open repeats (*, + and {n,}) more than two deep or more than 16 in
    all, counted repeats that write a part out more than 1000 times, groups more than 100 deep. So are back references,
    flags, conditions and atomic groups, and what `regex` reads in another way: fuzzy counts such as {e<=1}, and POSIX
    classes. The matcher remembers where a repeat has failed, so that hardly anything of what is left is slow; whoever
    calls it gives it a timeout, which `regex` takes in seconds of the process's own processor time: how busy the
    machine is changes nothing.
    Raises: ValueError that says why a pattern is refused.
    """
    if len(text) > MAX_PATTERN_CHARACTERS:
        raise ValueError(f"is longer than {MAX_PATTERN_CHARACTERS} characters")
    _refuse_costly(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FutureWarning about nested sets; the meaning is today's
            re.compile(text)
        return regex.compile(template.format(text), regex.VERSION0, cache_pattern=False)
    except (re.error, regex.error, RecursionError, OverflowError, ValueError) as error:
        raise ValueError(f"is not a regular expression ({type(error).__name__}: {error})") from error


@dataclass
class _Repeats:
    """Of a part of a pattern: open repeats in all and inside each other, and copies that counted repeats make."""

    count: int = 0
    depth: int = 0
    copies: int = 1

    def add(self, other: _Repeats) -> None:
        """Take in a part of this part."""
        self.count += other.count
        self.depth = max(self.depth, other.depth)
        self.copies = max(self.copies, other.copies)

    def repeat(self, quantifier: str) -> None:
        """Apply *, +, ?, {n}, {n,} or {n,m}."""
        numbers = [int(number) for number in re.findall(r"\d+", quantifier)]
        self.copies *= max([1, *numbers])
        if quantifier[0] in "*+" or quantifier.rstrip("?+").endswith(",}"):
            self.count, self.depth = self.count + 1, self.depth + 1
        if self.count > MAX_OPEN_REPEATS or self.depth > MAX_OPEN_DEPTH or self.copies > MAX_COPIES:
            raise ValueError("can take too many steps: it repeats too much, or repeats inside repeats")


def _refuse_costly(text: str) -> None:
    """Refuse by structure.

    Raises: ValueError. What is no expression at all is left to the compiler.
    """
    parts = [[_Repeats()]]  # of each group that is open: its parts so far, the last of which a quantifier repeats
    for piece in PATTERN_PIECE.finditer(text):
        kind, token = piece.lastgroup, piece.group()
        if kind == "group":
            parts.append([_Repeats()])
            if len(parts) > MAX_GROUPS:
                raise ValueError("is nested too deeply")
            if token == "(" and text.startswith("?", piece.end()):
                raise ValueError("sets flags such as (?i), or uses conditions or atomic groups")
        elif kind == "close" and len(parts) > 1:
            whole = _Repeats()
            for part in parts.pop():
                whole.add(part)
            parts[-1].append(whole)
        elif kind == "repeat":
            parts[-1][-1].repeat(token)
        elif token == "{" or (kind == "set" and "[:" in token):
            raise ValueError("has a brace or a bracket in a set that counts nothing: write \\ before it")
        elif re.fullmatch(r"\\[1-9]", token):
            raise ValueError("uses back references")
        else:
            parts[-1].append(_Repeats())
    whole = _Repeats()
    for part in (part for group in parts for part in group):
        whole.add(part)
    if whole.count > MAX_OPEN_REPEATS:
        raise ValueError("can take too many steps: it repeats too much")
