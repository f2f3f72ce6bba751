"""Share of supervised tokens that are the model's first choice, given the true tokens before them."""

from tunekit.metrics.loss import mean_of

DESCRIPTION = "share of supervised tokens that are the model's first choice, given the true ones before"
HIGHER_IS_BETTER = True
NEEDS, from_sums = mean_of("correct")
