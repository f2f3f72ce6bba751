"""Mean reward of the preferred answers: beta times the log of the policy's probability over the reference's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunekit.metrics.loss import mean_of

DESCRIPTION = "mean reward of the preferred answers"
NEEDS = ("rewards_chosen", "units")
HIGHER_IS_BETTER = True


def from_sums(sums: Mapping[str, Any]) -> float:
    """sums["rewards_chosen"] / sums["units"]. Raises ValueError without pairs."""
    return mean_of(sums, "rewards_chosen")
