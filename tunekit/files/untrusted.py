"""Reads files that may be hostile (regular files of valid size, strict JSON) and compiles patterns that may be
hostile.

Memory is allocated by a file's real size, never by numbers in it.
"""

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

from tunekit.errors import AdapterError, InputError, ModelError, RunFolderError
from tunekit.files.durable import open_file

MAX_JSON_BYTES = 16 * 1024 * 1024
MAX_NUMBER_CHARACTERS = 40
MAX_PATTERN_CHARACTERS = 100_000
MAX_GROUPS = 100  # nested groups in a pattern
MAX_COPIES = 1000  # copies of a part after expansion of counted repeats
MAX_WRITTEN_OUT = 100_000  # parts of an expression after expansion of its counted repeats, as the matcher stores it
MAX_OPEN_REPEATS, MAX_OPEN_DEPTH = 16, 2  # open repeats in a pattern, and their depth of nesting
PATTERN_PIECE = re.compile(
    r"(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])|(?P<group>\((?:\?(?:P<\w+>|<[=!]|[:=!]))?)|(?P<close>\))"
    r"|(?P<repeat>(?:[*+?]|\{(?:\d+(?:,\d*)?|,\d+)\})[?+]?)|(?P<between>\|)|(?P<one>\\.|.)",
    re.DOTALL,
)


Match = regex.Match[str]


@dataclass(frozen=True)
class FileKind:
    """Rules for reading one kind of file. `error`: for all faults; `follows_links`: whether links are allowed."""

    error: type[InputError]
    follows_links: bool = False
    json_bytes: int = MAX_JSON_BYTES


ADAPTER_FILE = FileKind(AdapterError)
MODEL_FILE = FileKind(ModelError, follows_links=True, json_bytes=100_000_000)  # the hub's cache consists of links
RUN_FILE = FileKind(RunFolderError, json_bytes=100_000_000)
RUN_RECORD = FileKind(RunFolderError, follows_links=True, json_bytes=100_000_000)  # nothing is loaded from it


@contextmanager
def open_regular(path: Path, kind: FileKind = ADAPTER_FILE) -> Iterator[tuple[int, int]]:
    """The descriptor and size of a regular file. A pipe is refused without waiting for it.

    Raises: the kind's error.
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
    """The bytes of a file that is not larger than the kind's limit for JSON.

    Raises: the kind's error.
    """
    with open_regular(path, kind) as (number, size_bytes):
        if size_bytes > kind.json_bytes:
            raise kind.error(f"has {size_bytes} bytes; at most {kind.json_bytes} are read", file=str(path))
        return read_exactly(number, size_bytes, path, kind)


def sha256_of(path: Path, kind: FileKind = ADAPTER_FILE) -> str:
    """Hex digest of a regular file.

    Raises: the kind's error.
    """
    with open_regular(path, kind) as (number, _), open(number, "rb", closefd=False) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_exactly(number: int, size_bytes: int, path: Path, kind: FileKind) -> bytes:
    """The next bytes of an open file.

    Raises: the kind's error if it ends too early.
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
        raise error("is nested too deeply", file=file) from fault
    except ValueError as fault:  # also JSONDecodeError and UnicodeDecodeError
        raise error(f"is not valid JSON: {printable(str(fault), 200)}", file=file) from fault
    if not isinstance(value, dict):
        raise error("does not contain a JSON object", file=file)
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
    """Whether both have the same type and value: 0 is not False."""
    return type(left) is type(right) and bool(left == right)


def printable(value: object, characters: int = 80) -> str:
    """A foreign value, shortened and printable."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
    return text if len(text) <= characters else text[: characters - 3] + "..."


@lru_cache(maxsize=1024)
def compile_pattern(text: str, template: str = "{}") -> regex.Pattern[str]:
    """A regular expression with Python's syntax and meaning, inserted into `template`, compiled by the package
    `regex`.

    Patterns that could take exponential time are refused by their structure alone: open repeats (*, + and {n,}) nested
    more than two deep or more than 16 in total, counted repeats that expand a part more than 1000 times, groups nested
    more than 100 deep. Also refused are back references, flags, conditions, atomic groups, and syntax that only
    `regex` knows: fuzzy counts such as {e<=1}, and POSIX classes. The matcher remembers where a repeat has failed, so
    almost nothing that remains is slow. Callers also set a timeout, which `regex` counts in processor seconds of this
    process, independent of the machine's load.
    Raises: ValueError with the reason for a refusal.
    """
    if len(text) > MAX_PATTERN_CHARACTERS:
        raise ValueError(f"is longer than {MAX_PATTERN_CHARACTERS} characters")
    _refuse_costly(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FutureWarning about nested sets; the present meaning is wanted
            re.compile(text)
        return regex.compile(template.format(text), regex.VERSION0, cache_pattern=False)
    except (re.error, regex.error, RecursionError, OverflowError, ValueError) as error:
        raise ValueError(f"is not a regular expression ({type(error).__name__}: {error})") from error


@dataclass
class _Repeats:
    """Counts for a part of a pattern: open repeats, their depth of nesting, and copies after expansion of counted
    repeats."""

    count: int = 0
    depth: int = 0
    copies: int = 1

    def repeat(self, quantifier: str) -> None:
        """Add a quantifier: *, +, ?, {n}, {n,} or {n,m}."""
        numbers = [int(number) for number in re.findall(r"\d+", quantifier)]
        self.copies *= max([1, *numbers])
        if quantifier[0] in "*+" or quantifier.rstrip("?+").endswith(",}"):
            self.count, self.depth = self.count + 1, self.depth + 1
        if self.count > MAX_OPEN_REPEATS or self.depth > MAX_OPEN_DEPTH or self.copies > MAX_COPIES:
            raise ValueError("can take too many steps: it repeats too much, or repeats inside repeats")


def _refuse_costly(text: str) -> None:
    """Refuse a pattern whose structure allows exponential time.

    Raises: ValueError. Texts that are not expressions are not refused here but by the compiler.
    """
    parts = [[_Repeats()]]  # for each open group, its parts so far; a quantifier repeats the last part
    for piece in PATTERN_PIECE.finditer(text):
        kind, token = piece.lastgroup, piece.group()
        if kind == "group":
            parts.append([_Repeats()])
            if len(parts) > MAX_GROUPS:
                raise ValueError("is nested too deeply")
            if token == "(" and text.startswith("?", piece.end()):
                raise ValueError("sets flags such as (?i), or uses conditions or atomic groups")
        elif kind == "close" and len(parts) > 1:
            inner = parts.pop()
            count, depth = sum(part.count for part in inner), max(part.depth for part in inner)
            parts[-1].append(_Repeats(count, depth, max(part.copies for part in inner)))
        elif kind == "repeat":
            parts[-1][-1].repeat(token)
        elif token == "{" or (kind == "set" and "[:" in token):
            raise ValueError("has a brace or a bracket in a set that counts nothing: write \\ before it")
        elif re.fullmatch(r"\\[1-9]", token):
            raise ValueError("uses back references")
        else:
            parts[-1].append(_Repeats())
    if sum(part.count for group in parts for part in group) > MAX_OPEN_REPEATS:
        raise ValueError("can take too many steps: it repeats too much")


def compile_expression(text: str) -> regex.Pattern[str]:
    """An expression with Python's syntax and meaning, for searching a model's output with a timeout.

    Everything that `re` compiles is allowed, since the timeout ends slow searches; only the size is limited.
    Raises: ValueError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(text)
            return regex.compile(_without_extensions(text), regex.VERSION0, cache_pattern=False)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is not a regular expression ({type(error).__name__}: {error})") from error


def _without_extensions(text: str) -> str:
    """The same expression with a backslash before syntax that only `regex` knows: fuzzy counts and POSIX classes.

    Raises: ValueError if its counted repeats expand to too many parts.
    """
    pieces, sizes = list[str](), [[0]]  # for each open group, the sizes of its parts
    for piece in PATTERN_PIECE.finditer(text):
        kind, token = piece.lastgroup, piece.group()
        if kind == "group":
            sizes.append([0])
        elif kind == "close" and len(sizes) > 1:
            inner = sum(sizes.pop())
            sizes[-1].append(inner + 1)
        elif kind == "repeat":
            sizes[-1][-1] *= max([1, *map(int, re.findall(r"\d+", token))])
        else:
            sizes[-1].append(1)
        if token == "{":
            token = r"\{"
        elif kind == "set":
            token = "[" + re.sub(
                r"(?s)\\.|\[(?=:)", lambda found: found[0].replace("[", r"\[", found[0] == "["), token[1:]
            )
        pieces.append(token)
    if sum(map(sum, sizes)) > MAX_WRITTEN_OUT:
        raise ValueError(f"has more than {MAX_WRITTEN_OUT:,} parts after expansion of its counted repeats")
    return "".join(pieces)
