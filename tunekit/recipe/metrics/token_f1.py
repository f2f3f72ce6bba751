"""`metrics: [token_f1]`."""

DESCRIPTION = "overlap of the answer's words with the reference's, as a mean F1"
COMPUTED_FROM = "generation"
HIGHER_IS_BETTER = True
