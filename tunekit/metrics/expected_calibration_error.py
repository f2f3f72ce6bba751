"""Expected calibration error: how far predicted probabilities differ from accuracy. Rows are divided into bins by their
largest probability. The metric is the mean over bins, weighted by rows, of |mean probability - accuracy|."""

from collections.abc import Mapping
from typing import Any

DESCRIPTION = "mean difference between the predicted label's probability and the accuracy, over 15 equal bins"
NEEDS = ("calibration",)
HIGHER_IS_BETTER = False
BINS = 15  # bins of equal width; the upper bound is included


def from_sums(sums: Mapping[str, Any]) -> float:
    """The sum over bins of |sum of probabilities - number of right rows|, divided by the number of all rows. Raises
    ValueError if there are no rows.

    `calibration`: for each bin, the number of its rows, the sum of their largest probabilities, and the number of right
    rows.
    Source: Guo et al. 2017, eq. 3.
    """
    bins = sums["calibration"]
    total = sum(row[0] for row in bins)
    if total <= 0:
        raise ValueError("no labelled rows")
    return float(sum(abs(confidence - right) for _, confidence, right in bins) / total)
