"""Reads JSON Lines, JSON arrays and plain text strictly. Lines end at \\n only."""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

from tunekit.data.reading.data_file import DataFile, open_bytes
from tunekit.data.reading.problems import Problems
from tunekit.files.untrusted import refuse_constant, unique_pairs

LONGEST_LINE_BYTES = 64 * 2**20
BOM = b"\xef\xbb\xbf"
KEYS_OF_ROWS = ("data", "rows", "examples", "items", "train")  # no format has such a field


@dataclass(frozen=True)
class RawRow:
    """One row of a source. `line`: its line number, from 1; in a Parquet file or a hub data set, its row number."""

    line: int
    values: dict[str, Any]


class JsonFault(Exception):
    """An error in a JSON text. `how`: the remedy, if the text is otherwise well-formed."""

    def __init__(self, what: str, how: str = "") -> None:
        super().__init__(what)
        self.how = how


_DECODER = json.JSONDecoder(object_pairs_hook=unique_pairs, parse_constant=refuse_constant)


def parse_json(text: str, position: int = 0) -> tuple[Any, int]:
    """The JSON value at a position, and the position of its end. Raises: JsonFault."""
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise JsonFault(f"not valid JSON: {error.msg} (character {error.pos - position + 1})") from None
    except RecursionError:
        raise JsonFault("nested too deeply") from None
    except ValueError as error:  # a repeated key, NaN, or an integer of thousands of digits
        raise JsonFault(str(error).partition("; use sys.")[0], "correct the row, or leave it out") from None


def read_json_lines(file: DataFile, problems: Problems) -> Iterator[RawRow]:
    """Rows of a JSON Lines file, with one object per line; blank lines are skipped."""
    name = str(file.path)
    with open_bytes(file) as stream:
        for number in count(1):
            try:
                raw = stream.readline(LONGEST_LINE_BYTES + 1)
            except (OSError, EOFError) as error:
                problems.add(name, number, f"the rest of the file cannot be read: {error}", "the file may be cut short")
                return
            if not raw:
                return
            if len(raw) > LONGEST_LINE_BYTES:
                what = f"a line of more than {LONGEST_LINE_BYTES // 2**20} MiB"
                problems.add(name, number, what, "is this JSON Lines?")
                return
            yield from parse_line(raw, number, name, problems)


def parse_line(raw: bytes, number: int, name: str, problems: Problems) -> Iterator[RawRow]:
    """Yields the row of one line, if it is not blank. Adds a problem for an invalid line."""
    text = decode(raw.removeprefix(BOM) if number == 1 else raw, name, number, problems)
    stripped = (text or "").strip(" \t\r\n")
    if not stripped:
        return
    try:
        value, end = parse_json(stripped)
        if end != len(stripped):
            raise JsonFault(f"there is more text after the JSON value (character {end + 1})")
    except JsonFault as fault:
        problems.add(name, number, str(fault), fault.how or "write one JSON object per line")
        return
    if isinstance(value, dict):
        yield RawRow(number, value)
    else:
        problems.add(name, number, f"{kind_of(value)}, not an object", "write {...}")


def decode(raw: bytes, name: str, number: int, problems: Problems) -> str | None:
    """The text of UTF-8 bytes. Adds a problem and returns None for NUL bytes or invalid UTF-8."""
    if b"\x00" in raw:
        problems.add(name, number, "contains a NUL byte", "save the file as UTF-8; it may be UTF-16, or not text")
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        problems.add(name, number, f"not UTF-8: byte 0x{byte:02x} at byte {error.start + 1}", "save the file as UTF-8")
        return None


def read_json_array(file: DataFile, problems: Problems) -> Iterator[RawRow]:
    """The objects of a JSON array, each with the line where it begins. A .json file with JSON Lines is read too."""
    name = str(file.path)
    with open_bytes(file) as stream:
        text = decode(stream.read().removeprefix(BOM), name, 1, problems)
    if text is None:
        return
    position = skip_space(text, 0)
    if text[position : position + 1] != "[":
        yield from _read_objects(file, text, position, problems)
        return
    line, counted = 1, 0
    position = skip_space(text, position + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = parse_json(text, position)
        except JsonFault as fault:
            problems.add(name, line, str(fault), fault.how or "the rest of the array is not read")
            return
        if isinstance(value, dict):
            yield RawRow(line, value)
        else:
            problems.add(name, line, f"{kind_of(value)}, not an object", "write {...}")
        position = skip_space(text, position)
        if text[position : position + 1] not in (",", "]"):
            line += text.count("\n", counted, position)
            problems.add(name, line, "expected ',' or ']' here", "the rest of the array is not read")
            return
        position = skip_space(text, position + 1) if text[position] == "," else position
    rest = skip_space(text, position + 1)
    if rest < len(text):
        problems.add(name, 1 + text.count("\n", 0, rest), "there is more text after the array", "")


def _read_objects(file: DataFile, text: str, position: int, problems: Problems) -> Iterator[RawRow]:
    """Rows of a .json file that is not an array. It is read as JSON Lines if its first line is an object."""
    if (key := _key_of_rows(text, position)) is not None:
        what = f"the file is one object, and its rows are the list under '{key}'"
        how = f"write the list alone: jq .{key} {shlex.quote(file.path.name)} > rows.json"
        problems.add(str(file.path), 1 + text.count("\n", 0, position), what, how)
        return
    first = text[position:].split("\n", 1)[0].strip()
    try:
        value, end = parse_json(first)
        lines = isinstance(value, dict) and end == len(first)
    except JsonFault:
        lines = False
    if lines:
        yield from read_json_lines(file, problems)
        return
    line = 1 + text.count("\n", 0, position)
    problems.add(str(file.path), line, "the file is neither a JSON array of objects nor JSON Lines", "write [{...}]")


def _key_of_rows(text: str, position: int) -> str | None:
    """The key of the rows, if the text is a single object such as {"version": 1, "data": [{...}]}; None otherwise."""
    try:
        value, end = parse_json(text, position)
    except JsonFault:
        return None
    if not isinstance(value, dict) or skip_space(text, end) < len(text):
        return None
    lists = (key for key in KEYS_OF_ROWS if isinstance(value.get(key), list) and value[key])
    return next((key for key in lists if all(isinstance(row, dict) for row in value[key])), None)


def skip_space(text: str, position: int) -> int:
    """The first position, from `position` on, without JSON whitespace."""
    match = re.compile(r"[ \t\r\n]*").match(text, position)
    return match.end() if match else position


def kind_of(value: object) -> str:
    """The kind of a JSON value in words, such as "a list"."""
    kinds = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def read_text(file: DataFile, problems: Problems) -> Iterator[RawRow]:
    """A .txt file as one row, byte for byte."""
    with open_bytes(file) as stream:
        raw = stream.read().removeprefix(BOM)
    lines = enumerate(raw.split(b"\n"), 1)
    if None not in [decode(part, str(file.path), number, problems) for number, part in lines]:
        yield RawRow(1, {"text": raw.decode("utf-8")})
