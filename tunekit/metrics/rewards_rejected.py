"""Mean reward of the other answers: beta times the log of the policy's probability over the reference's."""

from __future__ import annotations

from tunekit.metrics.loss import mean_of

DESCRIPTION = "mean reward of the other answers"
NEEDS = ("rewards_rejected", "units")
HIGHER_IS_BETTER = False
from_sums = mean_of("rewards_rejected")
