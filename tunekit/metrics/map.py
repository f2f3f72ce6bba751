"""Mean average precision of the documents of a query."""

from tunekit.metrics.loss import mean_of

DESCRIPTION = "mean average precision of the documents of a query"
HIGHER_IS_BETTER = True
NEEDS, from_sums = mean_of("map", "queries")
