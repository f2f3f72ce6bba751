"""Mean reward of the other answers: beta times the log of the policy's probability over the reference's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunekit.metrics.loss import mean_of

DESCRIPTION = "mean reward of the other answers"
NEEDS = ("rewards_rejected", "units")
HIGHER_IS_BETTER = False


def from_sums(sums: Mapping[str, Any]) -> float:
    """sums["rewards_rejected"] / sums["units"]. Raises ValueError without pairs."""
    return mean_of(sums, "rewards_rejected")
