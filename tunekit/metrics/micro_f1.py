"""Micro F1: one F1 over all labels of all rows. Frequent labels count more than rare labels."""

from collections.abc import Mapping
from typing import Any

from tunekit.metrics.classes import f1

DESCRIPTION = "one F1 for all labels of all rows; frequent labels count more than rare ones"
NEEDS = ("label_counts",)
HIGHER_IS_BETTER = True


def from_sums(sums: Mapping[str, Any]) -> float:
    """2 TP / (2 TP + FP + FN), as in scikit-learn's f1_score(average="micro"). If there are no labels, the result is 0.

    `label_counts`: for each label, the number of rows predicted right, predicted, and labelled.
    """
    right, predicted, there = map(sum, zip(*sums["label_counts"], strict=True))
    return f1(right, predicted, there)
