"""`metrics: [rouge_l]`."""

DESCRIPTION = "longest common subsequence of words, as a mean F1"
COMPUTED_FROM = "generation"
HIGHER_IS_BETTER = True
