"""`format: labels`: a text and its label, `{"text": ..., "label": ...}`.

A label is text; whole numbers and truth values become text. A list states several labels of a row. A fractional number
is a value for regression. The label column may have another usual name.
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from tunekit.errors import DataError
from tunekit.formats.fields import Fields, check_text, read_text, read_value

ALIASES = dict.fromkeys(("labels", "category", "intent"), "label")
DESCRIPTION = (
    "text, and label (or labels, category, intent): a name or number, or a list of them (objective.problem_type)"
)
FIELDS = ("text", "label")
REQUIRED = ("text", "label")
EXAMPLE = "label"
PAIR_LABELS = ("gold_label", "is_duplicate", "score")  # names for pairs, used if no other name fits

# transformers' names for the meaning of a head's scores
SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single_label_classification", "multi_label_classification", "regression"

LabelValue = str | float | tuple[str | float, ...]  # a name, a fractional number, or several of either


@dataclass(frozen=True)
class LabelExample:
    """A text and its label. `second`: the second text, if the row is a pair of texts."""

    text: str
    label: LabelValue
    second: str | None = None


def make_example(row: Fields) -> LabelExample:
    """The text and its label."""
    return LabelExample(read_text(row, "text"), read_label(row))


def label_text(value: str | int) -> str:
    """A label as text, without spaces around it. Truth values, in any spelling, become `true` and `false`."""
    text = str(value).strip()
    return text.lower() if text.lower() in ("true", "false") else text


def label_field(row: Fields, weaker: Sequence[str] = ()) -> str:
    """The name of the column with the label. Columns named in `weaker` are used only if no other column can be the
    label.

    Raises: DataError if two columns could be the label.
    """
    named = ["label"] if "label" in row else [name for name in row if name in ALIASES]
    if len(named) > 1:
        what = f"the columns '{named[0]}' and '{named[1]}' could both be the label"
        raise DataError(what, f"map the right column under data.train[].columns, for example {{{named[0]}: label}}")
    return next(iter([*named, *(name for name in weaker if name in row)]), "label")


def read_label(row: Fields, weaker: Sequence[str] = ()) -> LabelValue:
    """The label of a row, from the column that `label_field` finds. Names of labels become text."""
    field = label_field(row, weaker)
    return label_value(read_value(row, field), field)


def label_value(value: object, field: str) -> LabelValue:
    """Converts a value from a file to a label, or to a tuple of labels. Raises: DataError for values that cannot be
    labels."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return tuple(_one_label(each, field) for each in value)
    return _one_label(value, field)


def of_cell(value: object) -> object:
    """Parses a text, such as a cell of a CSV file, if it is JSON of a list or a number. Any other value is returned
    unchanged."""
    if not isinstance(value, str) or not re.match(r"\s*[-\[0-9]", value):
        return value
    with suppress(ValueError, RecursionError):
        return json.loads(value)
    return value


def _one_label(label: object, field: str) -> str | float:
    if isinstance(label, float) and not label.is_integer():
        return label
    if not isinstance(label, str | int | float):
        found = "null" if label is None else type(label).__name__
        raise DataError(
            f"'{field}' must be a text or a number, or a list of them, not {found}", "write the row's label"
        )
    name = label_text(int(label) if isinstance(label, float) else label)
    check_text(name, field)
    if not name:
        raise DataError(f"'{field}' is empty", "write a label, or leave the row out")
    return name
