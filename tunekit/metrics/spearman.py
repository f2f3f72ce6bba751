"""Spearman's correlation: the correlation between the ranks of scores and the ranks of the rows' numbers."""

from collections.abc import Mapping
from typing import Any

from tunekit.metrics.outputs import ROW_VALUES, mean_of_outputs, spearman

DESCRIPTION = "Spearman correlation of scores and numbers; for rows with several numbers, the mean over the numbers"
NEEDS = (ROW_VALUES,)
HIGHER_IS_BETTER = True


def from_sums(sums: Mapping[str, Any]) -> float:
    """The correlation, averaged over the numbers of a row; nan if a number is constant. Raises ValueError without
    rows."""
    return mean_of_outputs(spearman, sums)
