"""`metrics: [token_accuracy]`."""

DESCRIPTION = "share of supervised tokens that are the model's first choice, given the true ones before"
COMPUTED_FROM = "loss"
HIGHER_IS_BETTER = True
