"""Mean number of tokens of the completions to the evaluation rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunekit.metrics.loss import mean_of

DESCRIPTION = "mean number of tokens of greedy completions"
NEEDS = ("completions_mean_length", "units")
HIGHER_IS_BETTER = False


def from_sums(sums: Mapping[str, Any]) -> float:
    """sums["completions_mean_length"] / sums["units"]. Raises ValueError without completions that were judged."""
    return mean_of(sums, "completions_mean_length")
