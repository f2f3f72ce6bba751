"""`metrics: [loss]`."""

DESCRIPTION = "mean negative log-likelihood of the supervised tokens"
COMPUTED_FROM = "loss"
HIGHER_IS_BETTER = False
