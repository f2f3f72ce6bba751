"""Mean of 1 / (rank of the first relevant document), or 0 if it is not among the first 10."""

from tunekit.metrics.loss import mean_of

DESCRIPTION = "mean of 1 / (rank of the first relevant document), or 0 if it is not among the first 10"
HIGHER_IS_BETTER = True
NEEDS, from_sums = mean_of("mrr_at_10", "queries")
