"""Share of supervised tokens that the model predicts as most likely, given the true tokens before them."""

from tunekit.metrics.loss import mean_of

DESCRIPTION = "share of supervised tokens that the model predicts as most likely, given the true tokens before them"
HIGHER_IS_BETTER = True
NEEDS, from_sums = mean_of("correct")
