"""Labels of multi-label rows (any number of labels per row), and labels of regression rows (numbers)."""

import json
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from tunekit.contracts import Labels
from tunekit.errors import DataError
from tunekit.formats.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL, LabelValue, label_value

LARGEST = 1e18  # the largest number to learn, because the sum of squares of a micro-batch must fit into float32


class LabelSets(Labels):
    """Labels for rows that have any number of labels. A row stores its labels as a JSON list of names, which may be
    empty."""

    def read(self, value: LabelValue) -> str:
        """The JSON list of the labels. Raises: DataError for a value that is not a list of names, or that repeats a
        name."""
        value = _listed(value)
        if not isinstance(value, tuple) or not all(isinstance(each, str) for each in value):
            how = 'write a list of label names, such as ["first", "second"], or [] for no label; in a CSV file, as JSON'
            raise DataError(f"the label {_shown(value)} is not a list of names", how)
        names = list[str]()
        for label in map(str, value):
            self.check(label)
            if label in names:
                how = (
                    "write the name of each label once; rows with 0 or 1 for every label (multi-hot rows) are not "
                    "supported"
                )
                raise DataError(f"the row has the label '{label}' twice", how)
            names.append(label)
        return json.dumps(names, ensure_ascii=False)

    def listed_in(self, text: str) -> list[str]:
        return [str(label) for label in json.loads(text)]

    def written(self, text: str) -> str:
        """The JSON list of the labels, in the order of the head's rows."""
        named = set(map(self.head_name, self.listed_in(text)))
        return json.dumps([name for name in self.names if name in named], ensure_ascii=False)

    def targets(self, texts: Iterable[str]) -> Tensor:
        """The targets of the loss, (R, C) float32: 1 if the row has the label, else 0."""
        numbers = [[self.head_rows[label] for label in self.listed_in(text)] for text in texts]
        values = torch.zeros(len(numbers), len(self.names))  # (R, C)
        for row, places in enumerate(numbers):
            values[row, places] = 1.0
        return values

    @property
    def placeholder(self) -> str:
        return "[]"


class Quantities(Labels):
    """Labels for rows that have one number for each output of the head. A row stores its numbers as a JSON list."""

    def read(self, value: LabelValue) -> str:
        """The JSON list of the numbers. Raises: DataError for text, an infinite or NaN number, or a wrong count of
        numbers."""
        value = _listed(value)
        numbers = [_number(each) for each in (value if isinstance(value, tuple) else (value,))]
        if not numbers:
            raise DataError("the label is an empty list", "write the row's numbers")
        if self.names and len(numbers) != len(self.names):
            what = (
                f"the row has {_counted(len(numbers))}, but the head needs {len(self.names)} ({self.text(self.names)})"
            )
            raise DataError(what, "write one number for each output of the head")
        return json.dumps(numbers)

    def listed_in(self, text: str) -> list[str]:
        return []

    def written(self, text: str) -> str:
        return numbers_text(self.values_in(text))

    def targets(self, texts: Iterable[str]) -> Tensor:
        """The numbers of the rows, (R, C) float32."""
        return torch.tensor([self.values_in(text) for text in texts], dtype=torch.float32)

    @property
    def placeholder(self) -> str:
        return json.dumps([0.0] * len(self.names))

    @staticmethod
    def values_in(text: str) -> list[float]:
        """The numbers in a text that `read` returned."""
        return [float(value) for value in json.loads(text)]

    def refuse_other_counts(self, texts: Iterable[tuple[str, str]]) -> int:
        """Check that all rows have equally many numbers, and return their count. `texts`: for each row, its label text
        and its origin.
        Raises: DataError for a row whose count differs from the first row's count."""
        count, first = 0, ""
        for text, origin in texts:
            numbers, first = len(self.values_in(text)), first or origin
            if numbers != (count := count or numbers):
                file, _, line = origin.rpartition(":")
                what = f"the row has {_counted(numbers)}, but the first row ({first}) has {count}"
                raise DataError(what, "write the same count of numbers in all rows", file=file, line=int(line))
        return count


LABEL_KINDS: dict[str, type[Labels]] = {SINGLE_LABEL: Labels, MULTI_LABEL: LabelSets, REGRESSION: Quantities}


def numbers_text(values: Iterable[float]) -> str:
    """The numbers as text, with six significant digits; a JSON list if there are several numbers."""
    texts = [f"{value:.6g}" for value in values]
    return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"


def _listed(value: LabelValue) -> LabelValue:
    """The label itself. If the label is a text with a JSON list (from a CSV file): the parsed list."""
    if not (isinstance(value, str) and value.startswith("[")):
        return value
    try:
        return label_value(json.loads(value), "label")
    except (ValueError, RecursionError):
        raise DataError(f"the label {_shown(value)} begins with '[' but is not a list", "write a JSON list") from None


def _number(value: str | float) -> float:
    try:
        number = float(value)
    except ValueError:
        raise DataError(f"the label {_shown(value)} is not a number", "write a number, or leave the row out") from None
    if not math.isfinite(number) or abs(number) > LARGEST:
        raise DataError(f"the label {number:g} is infinite, NaN or too large to be learned", "leave the row out")
    return number


def _shown(value: LabelValue) -> str:
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


def _counted(count: int) -> str:
    return "1 number" if count == 1 else f"{count} numbers"
