"""Mean reward of the preferred answers: beta times the log of the policy's probability over the reference's."""

from __future__ import annotations

from tunekit.metrics.loss import mean_of

DESCRIPTION = "mean reward of the preferred answers"
NEEDS = ("rewards_chosen", "units")
HIGHER_IS_BETTER = True
from_sums = mean_of("rewards_chosen")
