"""Mean log-probability of the other answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunekit.metrics.loss import mean_of

DESCRIPTION = "mean log-probability of the other answers"
NEEDS = ("logps_rejected", "units")
HIGHER_IS_BETTER = False


def from_sums(sums: Mapping[str, Any]) -> float:
    """sums["logps_rejected"] / sums["units"]. Raises ValueError without pairs."""
    return mean_of(sums, "logps_rejected")
