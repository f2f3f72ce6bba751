"""By how much the reward of the preferred answer is above the other's, on average."""

from tunekit.metrics.loss import mean_of

DESCRIPTION = "mean reward of the preferred answer less that of the other"
HIGHER_IS_BETTER = True
NEEDS, from_sums = mean_of("rewards_margins")
