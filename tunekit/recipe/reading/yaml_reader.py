"""Reads YAML text as plain values, with the line of each key.

Scalars follow YAML 1.2's core schema: only true and false are booleans, 1e-4 is a number, `no`, dates and 12:30 are
text. This module builds the values from the parser's events, without PyYAML's resolver tables. It refuses anchors,
merge keys and tags, and states their line.
"""

import re
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from tunekit.errors import Problem, RecipeError
from tunekit.recipe.reading.draft import Draft, KeyPath, Place, dotted

LARGEST_FILE_BYTES = 1 << 20
DEEPEST_LEVEL = 20
ENDINGS_OF_ROWS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
NEEDED = "write at least model, data and output; `tunekit init` writes a first recipe"
LONGEST_NUMBER = 300  # digits; longer ones overflow a float and, from 4,300 on, Python's int()

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOLEAN = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_NOT_FINITE = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_NOT_TEXT = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def read_recipe_file(path: Path) -> Draft:
    """Read a recipe file into a Draft.

    Raises: RecipeError if the file is not a readable YAML mapping.
    """
    file, reads = str(path), f"`tunekit init {shlex.quote(str(path))}` reads it, and writes a recipe for it"
    if path.suffix.lower() in ENDINGS_OF_ROWS and path.is_file():
        raise RecipeError("is a file of rows, not a recipe or a configuration", reads, file=file)
    draft = read_yaml(read_text(path), file)
    if not isinstance(draft.values, dict):
        kind = "a list" if isinstance(draft.values, list) else "a single value"
        empty = draft.values is None
        raise RecipeError(
            "the file is empty" if empty else f"the recipe is {kind}, not a mapping",
            reads if path.suffix == ".json" and isinstance(draft.values, list) else NEEDED,
            file=file,
        )
    return draft


def read_text(path: Path) -> str:
    """Read the text of a regular file of at most 1 MiB. Raises: RecipeError if this is not possible."""
    return _decode(_read_bytes(path), str(path))


def read_yaml(text: str, file: str) -> Draft:
    """Read one YAML document. The Draft's `values` can be any value, not only a mapping.

    Raises: RecipeError at a syntax error.
    """
    if bad := _NOT_TEXT.search(text):
        what = f"the character U+{ord(bad.group()):04X} is not allowed in YAML"
        raise RecipeError(what, "remove it", file=file, line=text.count("\n", 0, bad.start()) + 1)
    reader = _Reader(file)
    try:
        reader.read(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(*_syntax_words(error), file=file, line=mark.line + 1 if mark else None) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        what = f"not valid YAML: {str(error).splitlines()[0]}"
        raise RecipeError(what, "write plain keys and values", file=file) from None
    return reader.draft


def read_scalar(text: str) -> object:
    """The value of an unquoted scalar: null, a boolean, a number, or the text itself."""
    if text in _NULL:
        return None
    if text in _BOOLEAN:
        return _BOOLEAN[text]
    if _INTEGER.fullmatch(text):
        return int(text) if len(text) <= LONGEST_NUMBER else float(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _BASED.fullmatch(text):
        return int(text, 0) if len(text) <= LONGEST_NUMBER else float("inf")
    if not_finite := _NOT_FINITE.fullmatch(text):
        return float("nan") if not_finite.group(3) else float(f"{not_finite.group(1)}inf")
    return text


def _read_bytes(path: Path) -> bytes:
    """Read a regular file of at most 1 MiB. Folders, pipes and devices are not opened. Raises: RecipeError."""
    file = str(path)
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            kind = "a folder" if stat.S_ISDIR(facts.st_mode) else "not a regular file"
            raise RecipeError(f"is {kind}; a recipe is a YAML file", "write the path of the file", file=file)
        with path.open("rb") as opened:
            data = opened.read(LARGEST_FILE_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError("no such file", "`tunekit init` writes a first recipe", file=file) from None
    except (OSError, ValueError) as error:
        what = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        named = file if len(file) <= 200 and file.isprintable() else f"{file[:80]!r}..."
        raise RecipeError(what, "check the path and its permissions", file=named) from None
    if len(data) > LARGEST_FILE_BYTES:
        raise RecipeError("is larger than 1 MiB; a recipe is a page of YAML", "check the file name", file=file)
    return data


def _decode(data: bytes, file: str) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise RecipeError("is UTF-16", "save it as UTF-8", file=file)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError("is not UTF-8 text here", "save the file as UTF-8", file=file, line=line) from None


def _syntax_words(error: yaml.MarkedYAMLError) -> tuple[str, str]:
    """Describes a YAML syntax error in one line, and how to mend it."""
    problem = (error.problem or "cannot be read").replace("\n", " ")
    if "'\\t'" in problem:
        return "not valid YAML: a tab cannot indent", "use spaces"
    if "unknown escape character" in problem:
        return f"not valid YAML: {problem}, after a backslash in double quotes", "use single quotes, or / in paths"
    context = f" ({error.context})" if error.context else ""
    how = "check the indentation, brackets and quotes here and in the lines before"
    return f"not valid YAML: {problem}{context}".replace("\n", " "), how


_Node = yaml.ScalarEvent | yaml.CollectionStartEvent | yaml.AliasEvent


class _Reader:
    """Builds dicts, lists and scalars from parser events, and records the line of every key."""

    def __init__(self, file: str) -> None:
        self.draft = Draft(file)
        self._events: Iterator[Any] = iter(())

    def read(self, events: Iterator[Any]) -> None:
        """Read the only document of the stream."""
        self._events = events
        documents = 0
        value: object = None
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self._fail(event, "a second YAML document starts here", "a recipe is one document: remove the ---")
            elif isinstance(event, _Node):
                value = self._value(event, ())
        self.draft.values = value

    def _value(self, event: _Node, key: KeyPath) -> object:
        if isinstance(event, yaml.AliasEvent):
            self._note(event, key, f"the alias *{event.anchor} is not allowed", "write the value out")
            return None
        if event.anchor is not None:
            self._note(event, key, f"the anchor &{event.anchor} is not allowed", "remove it")
        if event.tag is not None and event.tag != "!":
            self._note(event, key, f"the tag {event.tag} is not allowed", "remove it, or quote text")
        if isinstance(event, yaml.ScalarEvent):
            plain = event.style is None and event.tag is None
            return read_scalar(event.value) if plain else self._text(event, key)
        if len(key) >= DEEPEST_LEVEL:
            self._fail(
                event, f"is nested more than {DEEPEST_LEVEL} levels deep", "a recipe needs no more than four levels"
            )
        return self._list(key) if isinstance(event, yaml.SequenceStartEvent) else self._mapping(key)

    def _text(self, event: yaml.ScalarEvent, key: KeyPath) -> str:
        bad = _NOT_TEXT.search(event.value)
        if bad and (bad.group() == "\0" or "\ud800" <= bad.group() <= "\udfff"):
            self._note(event, key, f"contains the character U+{ord(bad.group()):04X}, which is not text", "remove it")
        return event.value

    def _list(self, key: KeyPath) -> list[object]:
        items: list[object] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            inner = (*key, len(items))
            self.draft.places[inner] = self._place(event)
            items.append(self._value(event, inner))
        return items

    def _mapping(self, key: KeyPath) -> dict[str, object]:
        values: dict[str, object] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            name = self._name(event, key)
            inner = (*key, name)
            if not name.isprintable() or not name:
                self._note(
                    event, key, f"the key {name!r} is not printable" if name else "an empty key", "write KEY: VALUE"
                )
                self._skip(next(self._events))
            elif name == "<<" and event.style is None:
                self._note(event, inner, "merge keys (<<) are not allowed", "write the keys out")
                self._skip(next(self._events))
            elif name in values:
                first = self.draft.places[inner].line
                self._note(event, inner, f"is written twice (first in line {first})", "keep one")
                self._skip(next(self._events))
            else:
                self.draft.places[inner] = self._place(event)
                values[name] = self._value(next(self._events), inner)
        return values

    def _name(self, event: yaml.Event, key: KeyPath) -> str:
        """The name of a key: the unconverted text of a scalar, so `no`, `1` and `true` are names too."""
        if not isinstance(event, yaml.ScalarEvent):
            self._fail(event, "a key must be a name, not a list, mapping or alias", "write KEY: VALUE")
        if event.anchor is not None or event.tag is not None:
            self._note(event, key, "an anchor or tag on a key is not allowed", "remove it")
        return event.value

    def _skip(self, event: yaml.Event) -> None:
        """Skip the value of a key that was refused."""
        depth = int(isinstance(event, yaml.CollectionStartEvent))
        while depth:
            event = next(self._events)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)

    def _note(self, event: yaml.Event, key: KeyPath, what: str, how: str) -> None:
        place = self._place(event)
        self.draft.problems.append(Problem(what, how, file=place.file, line=place.line, key=dotted(key) or None))

    def _fail(self, event: yaml.Event, what: str, how: str) -> NoReturn:
        raise RecipeError(what, how, file=self.draft.file, line=self._place(event).line)

    def _place(self, event: yaml.Event) -> Place:
        mark = event.start_mark
        return Place(self.draft.file, mark.line + 1 if mark else None)
