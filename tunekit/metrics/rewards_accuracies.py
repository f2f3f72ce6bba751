"""Share of pairs whose preferred answer has the higher reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunekit.metrics.loss import mean_of

DESCRIPTION = "share of pairs whose preferred answer has the higher reward"
NEEDS = ("rewards_accuracies", "units")
HIGHER_IS_BETTER = True


def from_sums(sums: Mapping[str, Any]) -> float:
    """sums["rewards_accuracies"] / sums["units"]. Raises ValueError without pairs."""
    return mean_of(sums, "rewards_accuracies")
