"""Mean log-probability of the preferred answers."""

from tunekit.metrics.loss import mean_of

DESCRIPTION = "mean log-probability of the preferred answers"
HIGHER_IS_BETTER = True
NEEDS, from_sums = mean_of("logps_chosen", "chosen_units")
