"""Mean reward of the preferred answers. The reward is beta times the log-ratio of policy to reference."""

from tunekit.metrics.loss import mean_of

DESCRIPTION = "mean reward of the preferred answers"
HIGHER_IS_BETTER = True
NEEDS, from_sums = mean_of("rewards_chosen", "chosen_units")
