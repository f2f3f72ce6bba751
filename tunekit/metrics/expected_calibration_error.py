"""How far the probability of the chosen label is from how often it is right, over bins of probability."""

from collections.abc import Mapping
from typing import Any

DESCRIPTION = "how far a label's probability is from how often it is right; 15 bins of equal width"
NEEDS = ("calibration",)
HIGHER_IS_BETTER = False
BINS = 15  # of equal width, each with its upper end


def from_sums(sums: Mapping[str, Any]) -> float:
    """Sum over the bins of |probabilities - right ones| / rows. Raises ValueError without rows.

    `calibration`: of each bin its rows, the sum of their largest probabilities, and how many of them are right.
    Source: Guo et al. 2017, eq. 3.
    """
    bins = sums["calibration"]
    total = sum(row[0] for row in bins)
    if total <= 0:
        raise ValueError("no labelled rows")
    return float(sum(abs(confidence - right) for _, confidence, right in bins) / total)
