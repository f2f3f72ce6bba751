"""`metrics: [perplexity]`."""

DESCRIPTION = "exp of the loss"
COMPUTED_FROM = "loss"
HIGHER_IS_BETTER = False
