"""Mean log-probability of the rejected answers."""

from tunekit.metrics.loss import mean_of

DESCRIPTION = "mean log-probability of the rejected answers"
HIGHER_IS_BETTER = False
NEEDS, from_sums = mean_of("logps_rejected", "rejected_units")
