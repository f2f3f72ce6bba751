"""By how much the reward of the preferred answer is above the other's, on average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunekit.metrics.loss import mean_of

DESCRIPTION = "mean reward of the preferred answer less that of the other"
NEEDS = ("rewards_margins", "units")
HIGHER_IS_BETTER = True


def from_sums(sums: Mapping[str, Any]) -> float:
    """sums["rewards_margins"] / sums["units"]. Raises ValueError without pairs."""
    return mean_of(sums, "rewards_margins")
