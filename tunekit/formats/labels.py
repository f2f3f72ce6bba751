"""`format: labels`: a text and its label, `{"text": ..., "label": ...}`.

Comes in: one row.  Goes out: LabelExample.  A label is text; a whole number or a truth value is read as its text.
"""

from dataclasses import dataclass

from tunekit.errors import DataError
from tunekit.formats.fields import Fields, read_text, read_value

DESCRIPTION = "text, and label: the name of its class, or a whole number"
FIELDS = ("text", "label")
REQUIRED = ("text", "label")
EXAMPLE = "label"


@dataclass(frozen=True)
class LabelExample:
    """A text and the name of its class."""

    text: str
    label: str


def make_example(row: Fields) -> LabelExample:
    """The text and its label."""
    return LabelExample(read_text(row, "text"), read_label(row))


def read_label(row: Fields) -> str:
    """The label of a row, as text."""
    label = read_value(row, "label")
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if not isinstance(label, str | int):
        found = "null" if label is None else type(label).__name__
        raise DataError(f"'label' must be a text or a whole number, not {found}", "write one label a row")
    name = str(label).strip()
    if not name:
        raise DataError("'label' is empty", "name a class, or leave the row out")
    return name
