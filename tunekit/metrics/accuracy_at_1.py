"""Share of queries whose first document is relevant."""

from tunekit.metrics.loss import mean_of

DESCRIPTION = "share of queries whose first document is relevant"
HIGHER_IS_BETTER = True
NEEDS, from_sums = mean_of("accuracy_at_1", "queries")
