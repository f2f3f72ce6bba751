"""The reward of the preferred answer less the reward of the rejected one, on average."""

from collections.abc import Mapping
from typing import Any

from tunekit.metrics import rewards_chosen, rewards_rejected

DESCRIPTION = "mean reward of the preferred answer less that of the other"
HIGHER_IS_BETTER = True
NEEDS = ("rewards_chosen", "rewards_rejected", "units")


def from_sums(sums: Mapping[str, Any]) -> float:
    """The mean reward of chosen answers less the mean reward of rejected ones. Raises ValueError without units."""
    return rewards_chosen.from_sums(sums) - rewards_rejected.from_sums(sums)
