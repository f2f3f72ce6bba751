"""Mean log-probability of the preferred answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunekit.metrics.loss import mean_of

DESCRIPTION = "mean log-probability of the preferred answers"
NEEDS = ("logps_chosen", "units")
HIGHER_IS_BETTER = True


def from_sums(sums: Mapping[str, Any]) -> float:
    """sums["logps_chosen"] / sums["units"]. Raises ValueError without pairs."""
    return mean_of(sums, "logps_chosen")
