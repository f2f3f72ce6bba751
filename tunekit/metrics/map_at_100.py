"""Mean average precision of the first 100 documents of a query."""

from tunekit.metrics.loss import mean_of

DESCRIPTION = "mean average precision of the first 100 documents of a query"
HIGHER_IS_BETTER = True
NEEDS, from_sums = mean_of("map_at_100", "queries")
