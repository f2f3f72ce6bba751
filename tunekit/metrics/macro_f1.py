"""F1 of each label, averaged over labels, so that rare labels count as much as frequent labels."""

from collections.abc import Mapping
from typing import Any

from tunekit.metrics.classes import f1

DESCRIPTION = "F1 of each label, averaged over the labels that occur or are predicted"
NEEDS = ("label_counts",)
HIGHER_IS_BETTER = True


def from_sums(sums: Mapping[str, Any]) -> float:
    """Mean over labels of 2 TP / (2 TP + FP + FN), as scikit-learn's f1_score(average="macro").

    `label_counts`: for each label, the numbers of rows predicted right, predicted, and labelled. Labels that are
    neither predicted nor true are left out. 0 if no label is left.
    """
    counts = sums["label_counts"]
    scores = [f1(right, predicted, there) for right, predicted, there in counts if predicted + there]
    return sum(scores) / len(scores) if scores else 0.0
