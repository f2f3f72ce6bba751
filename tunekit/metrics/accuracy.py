"""The share of rows whose predicted label is right. A row with several labels counts as right only if all of them are
right."""

from collections.abc import Mapping
from typing import Any

DESCRIPTION = "share of rows whose predicted label is right (with several labels: whose labels are all right)"
NEEDS = ("labelled",)
HIGHER_IS_BETTER = True


def from_sums(sums: Mapping[str, Any]) -> float:
    """The number of rows predicted right, divided by the number of rows. Raises ValueError if there are no rows."""
    right, rows = sums["labelled"]
    if rows <= 0:
        raise ValueError("no labelled rows")
    return float(right / rows)
