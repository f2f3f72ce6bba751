"""F1 of each label, averaged over labels: rare ones count as much as frequent ones."""

from collections.abc import Mapping
from typing import Any

from tunekit.metrics.classes import counts_of, f1

DESCRIPTION = "F1 of each label, averaged over the labels that occur or are predicted"
NEEDS = ("confusion",)
HIGHER_IS_BETTER = True


def from_sums(sums: Mapping[str, Any]) -> float:
    """Mean over labels of 2 TP / (2 TP + FP + FN), as scikit-learn's f1_score(average="macro").

    `confusion`: rows are true labels, columns predicted ones; a label in neither is left out. Raises ValueError without
    rows.
    """
    counts = counts_of(sums["confusion"])
    scores = [f1(right, predicted, there) for right, predicted, there in counts if predicted + there]
    if not scores:
        raise ValueError("no labelled rows")
    return sum(scores) / len(scores)
