"""Mean number of tokens of the greedy completions of evaluation rows."""

from tunekit.metrics.loss import mean_of

DESCRIPTION = "mean number of tokens of greedy completions"
HIGHER_IS_BETTER = False
NEEDS, from_sums = mean_of("completions_mean_length")
