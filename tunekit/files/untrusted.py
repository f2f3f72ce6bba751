"""Reads files that may be hostile: regular files of sane size, strict JSON; and compiles patterns that may be.

Comes in: a path.  Goes out: bytes or a JSON object, or an error that names the file and the fault.  Nothing here
allocates by what a file claims, only by what it is.
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
MAX_GROUPS = 100  # inside each other
MAX_COPIES = 1000  # of a part that counted repeats write out
MAX_WRITTEN_OUT = 100_000  # parts of an expression with its counted repeats written out, as the matcher holds it
MAX_OPEN_REPEATS, MAX_OPEN_DEPTH = 16, 2  # in a pattern, and inside each other
PATTERN_PIECE = re.compile(
    r"(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])|(?P<group>\((?:\?(?:P<\w+>|<[=!]|[:=!]))?)|(?P<close>\))"
    r"|(?P<repeat>(?:[*+?]|\{(?:\d+(?:,\d*)?|,\d+)\})[?+]?)|(?P<between>\|)|(?P<one>\\.|.)",
    re.DOTALL,
)


Match = regex.Match[str]


@dataclass(frozen=True)
class FileKind:
    """How files of one kind are read: the error for their faults, whether they may be links, their largest JSON."""

    error: type[InputError]
    follows_links: bool = False
    json_bytes: int = MAX_JSON_BYTES


ADAPTER_FILE = FileKind(AdapterError)
MODEL_FILE = FileKind(ModelError, follows_links=True, json_bytes=100_000_000)  # the hub's cache is made of links
RUN_FILE = FileKind(RunFolderError, json_bytes=100_000_000)
RUN_RECORD = FileKind(RunFolderError, follows_links=True, json_bytes=100_000_000)  # which nothing is loaded from


@contextmanager
def opened(path: Path, kind: FileKind = ADAPTER_FILE) -> Iterator[tuple[int, int]]:
    """File number and size of a regular file; never waits for a pipe.

    Raises: the kind's error.
    """
    try:
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
        number = open_file(path, flags, follows_links=kind.follows_links)
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
    with opened(path, kind) as (number, _), open(number, "rb", closefd=False) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
            object_pairs_hook=unique_pairs,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=refuse_constant,
        )
    except RecursionError as fault:
        raise error("is nested too deeply", file=file) from fault
    except ValueError as fault:  # also JSONDecodeError and UnicodeDecodeError
        raise error(f"is not valid JSON: {shown(str(fault), 200)}", file=file) from fault
    if not isinstance(value, dict):
        raise error("does not hold a JSON object", file=file)
    return value


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json's object_pairs_hook. Raises: ValueError for a key that stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key '{shown(next(key for key in keys if keys.count(key) > 1))}' stands twice")
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


def refuse_constant(text: str) -> None:
    """For json's parse_constant: NaN and the infinities. Raises: ValueError."""
    raise ValueError(f"the literal {text} is not JSON")


def same(left: object, right: object) -> bool:
    """Equal in type and value: 0 is not False."""
    return type(left) is type(right) and bool(left == right)


def shown(value: object, characters: int = 80) -> str:
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
    """An expression of Python's syntax and meaning for texts that a model wrote, whose search takes a timeout.

    Everything that `re` compiles is allowed, as the timeout ends what is slow; only its size is bounded.
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
    """The same expression with a backslash before what `regex` alone reads: fuzzy counts and POSIX classes.

    Raises: ValueError if its counted repeats write out too much.
    """
    pieces, sizes = list[str](), [[0]]  # of each open group the size of its parts
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
        raise ValueError(f"has more than {MAX_WRITTEN_OUT:,} parts with its counted repeats written out")
    return "".join(pieces)
