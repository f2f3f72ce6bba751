"""Regression metrics: the mean squared error of predicted scores, and their correlations with the true numbers.

Sums are exactly rounded (math.fsum), so that they do not depend on the order of the rows.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from math import fsum, isfinite, nan, sqrt
from typing import Any

from tunekit.basics import JsonObject

ROW_VALUES = "row values"  # entry of the sums: (rows, 2 C), the scores of each row, then its numbers

Column = Sequence[float]
Measure = Callable[[Column, Column], float]


def mean_of_outputs(measure: Measure) -> tuple[tuple[str], Callable[[Mapping[str, Any]], float]]:
    """The constant NEEDS and the function `from_sums` of a regression metric: the value of `measure` for each output of
    the head, averaged over outputs."""

    def from_sums(sums: Mapping[str, Any]) -> float:
        """The mean; NaN if the measure is undefined for an output. Raises ValueError if there are no rows."""
        columns = _columns(sums[ROW_VALUES])
        if not columns:
            raise ValueError("no rows with numbers")
        return fsum(measure(scores, values) for scores, values in columns) / len(columns)

    return (ROW_VALUES,), from_sums


def output_table(labels: Sequence[str], values: Sequence[Column]) -> list[JsonObject]:
    """A line of metrics for each output of the head. A correlation is None if the scores or the numbers are
    constant."""
    lines = []
    for label, (scores, numbers) in zip(labels, _columns(values), strict=True):
        found = {"mse": squared_error(scores, numbers), "pearson": pearson(scores, numbers)}
        found["spearman"] = spearman(scores, numbers)
        finite = {name: value if isfinite(value) else None for name, value in found.items()}
        lines.append({"label": label, **finite, "rows": len(numbers)})
    return lines


def _columns(rows: Sequence[Column]) -> list[tuple[Column, Column]]:
    """For each output of the head: the scores of all rows, and the true numbers of all rows."""
    columns = list(zip(*rows, strict=True))
    half = len(columns) // 2
    return list(zip(columns[:half], columns[half:], strict=True))


def squared_error(scores: Column, values: Column) -> float:
    """Mean of (score - value)^2."""
    return fsum((score - value) ** 2 for score, value in zip(scores, values, strict=True)) / len(values)


def pearson(scores: Column, values: Column) -> float:
    """Pearson's correlation, as in scipy.stats.pearsonr; nan if the scores or the numbers are constant, or if one is
    not finite."""
    if min(scores) == max(scores) or min(values) == max(values) or not all(map(isfinite, (*scores, *values))):
        return nan
    first, second = (_less_mean(each) for each in (scores, values))
    both = fsum(one * other for one, other in zip(first, second, strict=True))
    squares = (fsum(each**2 for each in some) for some in (first, second))
    return max(-1.0, min(1.0, both / sqrt(next(squares) * next(squares))))


def spearman(scores: Column, values: Column) -> float:
    """Pearson's correlation of the ranks, as in scipy.stats.spearmanr; nan if the scores or the numbers are constant,
    or if one is not finite."""
    return pearson(_ranks(scores), _ranks(values)) if all(map(isfinite, (*scores, *values))) else nan


def _less_mean(values: Column) -> list[float]:
    mean = fsum(values) / len(values)
    return [value - mean for value in values]


def _ranks(values: Column) -> list[float]:
    """The rank of each value, starting at 1. Equal values get the mean of their ranks."""
    order, ranks, before = sorted(range(len(values)), key=values.__getitem__), [0.0] * len(values), 0
    for _, group in groupby(order, key=values.__getitem__):
        places = list(group)
        for place in places:
            ranks[place] = before + (len(places) + 1) / 2
        before += len(places)
    return ranks
