"""Mean negative log-likelihood of the supervised tokens, from its sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DESCRIPTION = "mean negative log-likelihood of the supervised tokens"
NEEDS = ("loss", "units")
HIGHER_IS_BETTER = False


def mean_of(sums: Mapping[str, Any], name: str) -> float:
    """A sum over the number of its units. Raises ValueError where there are none."""
    if sums["units"] <= 0:
        raise ValueError("no supervised tokens")
    return float(sums[name] / sums["units"])


def from_sums(sums: Mapping[str, Any]) -> float:
    """sums["loss"] / sums["units"], in nats a unit (a supervised token, a label, a pair). Raises ValueError without."""
    return mean_of(sums, "loss")
