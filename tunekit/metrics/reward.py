"""Mean reward of the completions to the evaluation rows, one greedy one each, from its sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunekit.metrics.loss import mean_of

DESCRIPTION = "mean reward of greedy completions"
NEEDS = ("reward", "units")
HIGHER_IS_BETTER = True


def from_sums(sums: Mapping[str, Any]) -> float:
    """sums["reward"] / sums["units"]. Raises ValueError without completions that were judged."""
    return mean_of(sums, "reward")
