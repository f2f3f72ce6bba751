"""F1 of each label, averaged over labels: rare ones count as much as frequent ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DESCRIPTION = "F1 of each label, averaged over the labels that occur or are predicted"
NEEDS = ("confusion",)
HIGHER_IS_BETTER = True


def from_sums(sums: Mapping[str, Any]) -> float:
    """Mean over labels of 2 TP / (2 TP + FP + FN), as scikit-learn's f1_score(average="macro").

    `confusion`: rows are true labels, columns predicted ones; a label in neither is left out. Raises ValueError without
    rows.
    """
    confusion = sums["confusion"]
    scores = []
    for label, row in enumerate(confusion):
        both = sum(row) + sum(other[label] for other in confusion)  # 2 TP + FP + FN
        if both:
            scores.append(2 * row[label] / both)
    if not scores:
        raise ValueError("no labelled rows")
    return float(sum(scores) / len(scores))
