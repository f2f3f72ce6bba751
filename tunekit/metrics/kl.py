"""Mean log-ratio of policy and reference on answers to other prompts, as the objective kto estimates it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunekit.metrics.loss import mean_of

DESCRIPTION = "estimated KL of the policy from the reference, not below 0"
NEEDS = ("kl", "units")
HIGHER_IS_BETTER = False


def from_sums(sums: Mapping[str, Any]) -> float:
    """sums["kl"] / sums["units"]. Raises ValueError without rows."""
    return mean_of(sums, "kl")
