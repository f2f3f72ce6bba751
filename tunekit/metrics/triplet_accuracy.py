"""The share of negatives that are less similar to the anchor than the positive is."""

from tunekit.metrics.loss import mean_of

DESCRIPTION = "share of negatives that are less similar to the anchor than the positive is"
HIGHER_IS_BETTER = True
NEEDS, from_sums = mean_of("triplets_right", "triplets")
