"""Strict reading of one field of a row: a missing, null or non-text value is an error, never the text "None"."""

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from tunekit.errors import DataError

Fields = Mapping[str, Any]  # the fields of a row by name
MINIMUM_WEIGHT, MAXIMUM_WEIGHT = 1e-15, 1e15


def read_text(row: Fields, name: str, *, where: str = "") -> str:
    """The text of the field `name`."""
    return check_text(read_value(row, name, where=where), f"{where}{name}")


def read_value(row: Fields, name: str, *, where: str = "") -> object:
    """The value of the field `name`. Raises: DataError if the row does not have this field."""
    if name not in row:
        what = f"no field '{where}{name}'; this row has {listed(row)}"
        raise DataError(what, "add this field, or map a column to it under data.train[].columns")
    return row[name]


def named_nearly(value: object, known: Iterable[str]) -> str:
    """A hint "did you mean 'NAME'? " for a wrong name, with the most similar known name; "" if no name is
    similar."""
    near = difflib.get_close_matches(str(value), list(known), n=1)
    return f"did you mean '{near[0]}'? " if near else ""


def read_optional_text(row: Fields, name: str) -> str:
    """Reads a text from the field `name`. A missing or null field counts as the empty text."""
    return "" if row.get(name) is None else check_text(row[name], name)


def check_text(value: object, label: str) -> str:
    """Returns `value`. Raises: DataError if it is not a text that a tokenizer can read."""
    if not isinstance(value, str):
        kind = "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
        raise DataError(f"'{label}' must be text, not {kind}", "write the value in quotes, or leave the row out")
    if "\x00" in value:
        raise DataError(
            f"'{label}' contains a NUL character",
            "remove this character; it often means that the file is UTF-16 or binary data",
        )
    if not value.isascii():
        check_encodable(value, label)
    return value


def check_encodable(value: str, label: str) -> None:
    """Raises: DataError for lone surrogates, which no tokenizer can read."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise DataError(
            f"'{label}' contains the lone surrogate \\u{code:04x}",
            "write both surrogates of the pair, or U+FFFD instead",
        ) from None


def read_weight(value: object, label: str) -> float:
    """A weight in the loss: 0, or a number within limits, so that the product of two weights is finite in float32."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else -1.0
    if not (number == 0 or MINIMUM_WEIGHT <= number <= MAXIMUM_WEIGHT):
        allowed = f"0, or from {MINIMUM_WEIGHT:g} to {MAXIMUM_WEIGHT:g}"
        raise DataError(f"'{label}' must be a number, 0 or more, not {str(value)[:40]!r}", f"write {allowed}")
    return float(number)


def read_json(value: object, label: str) -> object:
    """The parsed JSON if `value` is a text; any other `value` unchanged."""
    if not isinstance(value, str):
        check_encodable(json.dumps(value, ensure_ascii=False, default=str), label)
        return value
    check_text(value, label)
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"'{label}' is text that is not JSON: {value[:60]!r}", "write a JSON object") from None


def listed(names: Iterable[Any]) -> str:
    """Quoted names, separated by commas, for a message."""
    return ", ".join(f"'{name}'" for name in names) or "no fields"
