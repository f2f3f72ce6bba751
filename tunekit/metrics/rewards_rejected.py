"""Mean reward of the rejected answers. The reward is beta times the log-ratio of policy to reference."""

from tunekit.metrics.loss import mean_of

DESCRIPTION = "mean reward of the rejected answers"
HIGHER_IS_BETTER = False
NEEDS, from_sums = mean_of("rewards_rejected", "rejected_units")
