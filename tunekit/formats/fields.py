"""Reading one field of a row, strictly: a missing, null, non-text or broken value is an error, never the text None."""

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from tunekit.errors import DataError

Fields = Mapping[str, Any]  # of a row, by name, as its file has them
LEAST_WEIGHT, MOST_WEIGHT = 1e-15, 1e15


def read_text(row: Fields, name: str, *, where: str = "") -> str:
    """The text under `name`."""
    return check_text(read_value(row, name, where=where), f"{where}{name}")


def read_value(row: Fields, name: str, *, where: str = "") -> object:
    """Whatever stands under `name`, which must be there."""
    if name not in row:
        what = f"no field '{where}{name}'; this row has {listed(row)}"
        raise DataError(what, "add it, or map a column to it under data.train[].columns")
    return row[name]


def named_nearly(value: object, known: Iterable[str]) -> str:
    """A question after the known name that is nearest to a wrong one; nothing where none is near."""
    near = difflib.get_close_matches(str(value), list(known), n=1)
    return f"did you mean '{near[0]}'? " if near else ""


def read_optional_text(row: Fields, name: str) -> str:
    """The text under `name`; absent or null is the empty text."""
    return "" if row.get(name) is None else check_text(row[name], name)


def check_text(value: object, label: str) -> str:
    """`value` if it is text that a tokenizer can read."""
    if not isinstance(value, str):
        kind = "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
        raise DataError(f"'{label}' must be text, not {kind}", "write it in quotes, or leave the row out")
    if "\x00" in value:
        raise DataError(f"'{label}' contains a NUL character", "remove it; often a sign of UTF-16 or binary data")
    if not value.isascii():
        check_encodable(value, label)
    return value


def check_encodable(value: str, label: str) -> None:
    """Refuse lone surrogates, which no tokenizer can read."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise DataError(
            f"'{label}' contains the lone surrogate \\u{code:04x}", "write the whole pair, or U+FFFD instead"
        ) from None


def read_weight(value: object, label: str) -> float:
    """A factor of a loss: 0, or a number whose product with another one float32 has."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else -1.0
    if not (number == 0 or LEAST_WEIGHT <= number <= MOST_WEIGHT):
        allowed = f"0, or from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}"
        raise DataError(f"'{label}' must be a number, 0 or more, not {str(value)[:40]!r}", f"write {allowed}")
    return float(number)


def read_json(value: object, label: str) -> object:
    """`value`, parsed where it is JSON written as text."""
    if not isinstance(value, str):
        check_encodable(json.dumps(value, ensure_ascii=False, default=str), label)
        return value
    check_text(value, label)
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"'{label}' is text that is not JSON: {value[:60]!r}", "write a JSON object") from None


def listed(names: Iterable[Any]) -> str:
    """Names for a message."""
    return ", ".join(f"'{name}'" for name in names) or "no fields"
