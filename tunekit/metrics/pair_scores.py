"""Metrics of pairs with a similarity and a label, 1 (similar) or 0. Pairs are called similar from a threshold on;
pairs with equal similarities are on one side of it.

The values are those of sentence-transformers' BinaryClassificationEvaluator.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from math import fsum, nan
from typing import Any

from tunekit.metrics.outputs import ROW_VALUES

PAIRS = "pairs"  # entry of the sums: the number of pairs with a label; only of losses that read labels
LabelledPairs = Sequence[Sequence[float]]


def of_pairs(measure: Callable[[LabelledPairs], float]) -> tuple[tuple[str, str], Callable[[Mapping[str, Any]], float]]:
    """The constant NEEDS and the function `from_sums` of a metric of pairs; NaN unless both labels, and no other
    numbers, occur."""

    def from_sums(sums: Mapping[str, Any]) -> float:
        pairs = sums[ROW_VALUES]
        return measure(pairs) if {label for _, label in pairs} == {0, 1} else nan

    return (ROW_VALUES, PAIRS), from_sums


def _counts(pairs: LabelledPairs) -> Iterator[tuple[int, int]]:
    """For each threshold, from the highest on: the number of pairs from it on, and how many of these are similar."""
    count = right = 0
    for _, group in groupby(sorted(pairs, key=lambda pair: -pair[0]), key=lambda pair: pair[0]):
        labels = [label for _, label in group]
        count, right = count + len(labels), right + int(sum(labels))
        yield count, right


def best_accuracy(pairs: LabelledPairs) -> float:
    """The accuracy with the best threshold."""
    similar = int(sum(label for _, label in pairs))
    dissimilar = len(pairs) - similar
    return max(dissimilar, *(2 * right - found + dissimilar for found, right in _counts(pairs))) / len(pairs)


def best_f1(pairs: LabelledPairs) -> float:
    """The F1 of similar pairs with the best threshold."""
    similar = sum(label for _, label in pairs)
    return max(2 * right / (found + similar) for found, right in _counts(pairs))


def average_precision(pairs: LabelledPairs) -> float:
    """sum over thresholds of (recall - recall at the threshold above) * precision."""
    similar, before, parts = sum(label for _, label in pairs), 0, []
    for found, right in _counts(pairs):
        parts.append((right - before) / similar * right / found)
        before = right
    return fsum(parts)
