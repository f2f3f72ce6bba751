"""`format: labels`: a text and its label, `{"text": ..., "label": ...}`.

A label is text; a whole number or a truth value is read as its text. Its column may have another usual name.
"""

from dataclasses import dataclass

from tunekit.errors import DataError
from tunekit.formats.fields import Fields, read_text, read_value

ALIASES = dict.fromkeys(("labels", "category", "intent"), "label")
DESCRIPTION = "text, and label (or labels, category, intent): the name of its class, or a whole number"
FIELDS = ("text", "label")
REQUIRED = ("text", "label")
EXAMPLE = "label"


@dataclass(frozen=True)
class LabelExample:
    """A text and the name of its class; `second`: the other text of a pair, which has one class."""

    text: str
    label: str
    second: str | None = None


def make_example(row: Fields) -> LabelExample:
    """The text and its label."""
    return LabelExample(read_text(row, "text"), read_label(row))


def label_text(value: str | int) -> str:
    """A label as text, without blanks around it. Truth values are `true` and `false`, however a file writes them."""
    text = str(value).strip()
    return text.lower() if text.lower() in ("true", "false") else text


def label_field(row: Fields) -> str:
    """The column with the label. Raises: DataError where it could be one of two."""
    named = ["label"] if "label" in row else [name for name in row if name in ALIASES]
    if len(named) > 1:
        what = f"the label may be '{named[0]}' or '{named[1]}'"
        raise DataError(what, f"map the right one under data.train[].columns, for example {{{named[0]}: label}}")
    return named[0] if named else "label"


def read_label(row: Fields) -> str:
    """The label of a row, as text."""
    field = label_field(row)
    label = read_value(row, field)
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if not isinstance(label, str | int):
        found = "null" if label is None else type(label).__name__
        raise DataError(f"'{field}' must be a text or a whole number, not {found}", "write one label a row")
    name = label_text(label)
    if not name:
        raise DataError(f"'{field}' is empty", "name a class, or leave the row out")
    return name
