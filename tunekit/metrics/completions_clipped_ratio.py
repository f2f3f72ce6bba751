"""Share of evaluation completions that were cut off at max_completion_length."""

from tunekit.metrics.loss import mean_of

DESCRIPTION = "share of greedy completions that were cut off at the maximum length"
HIGHER_IS_BETTER = False
NEEDS, from_sums = mean_of("completions_clipped_ratio")
