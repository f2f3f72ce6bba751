"""Macro F1: the F1 of each label, averaged over labels. Rare labels count as much as frequent labels."""

from collections.abc import Mapping
from typing import Any

from tunekit.metrics.classes import f1

DESCRIPTION = "mean F1 of the labels that occur or are predicted; rare labels count as much as frequent ones"
NEEDS = ("label_counts",)
HIGHER_IS_BETTER = True


def from_sums(sums: Mapping[str, Any]) -> float:
    """The mean over labels of 2 TP / (2 TP + FP + FN), as in scikit-learn's f1_score(average="macro").

    `label_counts`: for each label, the number of rows predicted right, predicted, and labelled. Labels that are neither
    predicted nor true are left out. If no label remains, the result is 0.
    """
    counts = sums["label_counts"]
    scores = [f1(right, predicted, there) for right, predicted, there in counts if predicted + there]
    return sum(scores) / len(scores) if scores else 0.0
