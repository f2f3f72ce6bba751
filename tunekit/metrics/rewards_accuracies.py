"""Share of pairs whose preferred answer has the higher reward."""

from tunekit.metrics.loss import mean_of

DESCRIPTION = "share of pairs whose preferred answer has the higher reward"
HIGHER_IS_BETTER = True
NEEDS, from_sums = mean_of("rewards_accuracies")
