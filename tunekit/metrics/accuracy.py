"""The share of rows with the right predicted label. A row with several labels is right if all of them are right."""

from collections.abc import Mapping
from typing import Any

DESCRIPTION = "share of rows whose predicted label is right; rows with several labels need all of them right"
NEEDS = ("labelled",)
HIGHER_IS_BETTER = True


def from_sums(sums: Mapping[str, Any]) -> float:
    """The number of rows predicted right, divided by the number of rows. Raises ValueError without rows."""
    right, rows = sums["labelled"]
    if rows <= 0:
        raise ValueError("no labelled rows")
    return float(right / rows)
