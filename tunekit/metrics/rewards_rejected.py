"""Mean reward of the other answers: beta times the log of the policy's probability over the reference's."""

from tunekit.metrics.loss import mean_of

DESCRIPTION = "mean reward of the other answers"
HIGHER_IS_BETTER = False
NEEDS, from_sums = mean_of("rewards_rejected", "rejected_units")
