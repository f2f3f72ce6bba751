"""`format: labels`: a text and its label, `{"text": ..., "label": ...}`.

A label is text; a whole number or a truth value is read as its text. A list of labels is one value of several, and a
fractional number one of regression. The column may have another usual name.
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
PAIR_LABELS = ("gold_label", "is_duplicate", "score")  # of pairs, where no other column is called as labels are

# transformers' names of what the scores of a head mean
SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single_label_classification", "multi_label_classification", "regression"

LabelValue = str | float | tuple[str | float, ...]  # a name; a fractional number; several of them


@dataclass(frozen=True)
class LabelExample:
    """A text and its label; `second`: the other text of a pair, which has one label."""

    text: str
    label: LabelValue
    second: str | None = None


def make_example(row: Fields) -> LabelExample:
    """The text and its label."""
    return LabelExample(read_text(row, "text"), read_label(row))


def label_text(value: str | int) -> str:
    """A label as text, without blanks around it. Truth values are `true` and `false`, however a file writes them."""
    text = str(value).strip()
    return text.lower() if text.lower() in ("true", "false") else text


def label_field(row: Fields, weaker: Sequence[str] = ()) -> str:
    """The column with the label; the first of the `weaker` names if there is no other. Raises: DataError where it could
    be one of two."""
    named = ["label"] if "label" in row else [name for name in row if name in ALIASES]
    if len(named) > 1:
        what = f"the label may be '{named[0]}' or '{named[1]}'"
        raise DataError(what, f"map the right one under data.train[].columns, for example {{{named[0]}: label}}")
    return next(iter([*named, *(name for name in weaker if name in row)]), "label")


def read_label(row: Fields, weaker: Sequence[str] = ()) -> LabelValue:
    """The label of a row, from the column that `label_field` names; names as text."""
    field = label_field(row, weaker)
    return label_value(read_value(row, field), field)


def label_value(value: object, field: str) -> LabelValue:
    """A label as a file has it, or a list of labels. Raises: DataError for other values."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return tuple(_one_label(each, field) for each in value)
    return _one_label(value, field)


def of_cell(value: object) -> object:
    """The list or the number that a text spells, as a cell of a CSV file does; any other value as it is."""
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
        raise DataError(f"'{field}' is empty", "name a class, or leave the row out")
    return name
