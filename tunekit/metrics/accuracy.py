"""The share of rows whose predicted label is the right one."""

from collections.abc import Mapping
from typing import Any

DESCRIPTION = "share of rows whose predicted label is right"
NEEDS = ("confusion",)
HIGHER_IS_BETTER = True


def from_sums(sums: Mapping[str, Any]) -> float:
    """The confusion matrix's diagonal over its sum. Raises ValueError without rows."""
    confusion = sums["confusion"]
    total = sum(map(sum, confusion))
    if total <= 0:
        raise ValueError("no labelled rows")
    return float(sum(row[number] for number, row in enumerate(confusion)) / total)
