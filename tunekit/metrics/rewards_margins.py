"""By how much the reward of the preferred answer is above the other's, on average."""

from __future__ import annotations

from tunekit.metrics.loss import mean_of

DESCRIPTION = "mean reward of the preferred answer less that of the other"
NEEDS = ("rewards_margins", "units")
HIGHER_IS_BETTER = True
from_sums = mean_of("rewards_margins")
