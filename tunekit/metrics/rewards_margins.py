"""Mean difference between the reward of the preferred and the reward of the rejected answer."""

from collections.abc import Mapping
from typing import Any

from tunekit.metrics import rewards_chosen, rewards_rejected

DESCRIPTION = "mean reward of the preferred answers minus mean reward of the rejected answers"
HIGHER_IS_BETTER = True
NEEDS = ("rewards_chosen", "rewards_rejected", "units")


def from_sums(sums: Mapping[str, Any]) -> float:
    """Mean reward of chosen answers minus mean reward of rejected answers. Raises ValueError if there are no units."""
    return rewards_chosen.from_sums(sums) - rewards_rejected.from_sums(sums)
