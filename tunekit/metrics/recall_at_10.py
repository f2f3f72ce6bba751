"""The share of a query's relevant documents that is among the first 10."""

from tunekit.metrics.loss import mean_of

DESCRIPTION = "share of a query's relevant documents that is among the first 10"
HIGHER_IS_BETTER = True
NEEDS, from_sums = mean_of("recall_at_10", "queries")
