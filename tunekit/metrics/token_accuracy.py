"""Share of supervised tokens that are the model's first choice, given the true tokens before them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunekit.metrics.loss import mean_of

DESCRIPTION = "share of supervised tokens that are the model's first choice, given the true ones before"
NEEDS = ("correct", "units")
HIGHER_IS_BETTER = True


def from_sums(sums: Mapping[str, Any]) -> float:
    """sums["correct"] / sums["units"], 0 to 1. Raises ValueError without tokens."""
    return mean_of(sums, "correct")
