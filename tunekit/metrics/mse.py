"""Mean squared error of the rows' numbers, from all scores and numbers."""

from collections.abc import Mapping
from typing import Any

from tunekit.metrics.outputs import ROW_VALUES, mean_of_outputs, squared_error

DESCRIPTION = "mean squared error; for rows with several numbers, the mean over the numbers"
NEEDS = (ROW_VALUES,)
HIGHER_IS_BETTER = False


def from_sums(sums: Mapping[str, Any]) -> float:
    """The mean squared error, averaged over the numbers of a row. Raises ValueError without rows."""
    return mean_of_outputs(squared_error, sums)
