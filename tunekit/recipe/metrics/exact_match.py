"""`metrics: [exact_match]`."""

DESCRIPTION = "share of generated answers equal to the reference, white space at the ends aside"
COMPUTED_FROM = "generation"
HIGHER_IS_BETTER = True
