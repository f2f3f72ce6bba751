"""Share of the completions to the evaluation rows that reached max_completion_length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunekit.metrics.loss import mean_of

DESCRIPTION = "share of greedy completions that did not end by themselves"
NEEDS = ("completions_clipped_ratio", "units")
HIGHER_IS_BETTER = False


def from_sums(sums: Mapping[str, Any]) -> float:
    """sums["completions_clipped_ratio"] / sums["units"]. Raises ValueError without completions that were judged."""
    return mean_of(sums, "completions_clipped_ratio")
