"""Normalised discounted cumulative gain of the first 10 documents of a query (binary relevance)."""

from tunekit.metrics.loss import mean_of

DESCRIPTION = "normalised discounted cumulative gain of the first 10 documents of a query (binary relevance)"
HIGHER_IS_BETTER = True
NEEDS, from_sums = mean_of("ndcg_at_10", "queries")
