"""Share of answers equal to their reference, white space at both ends aside."""

from tunekit.metrics.pairs import mean_of_pairs

DESCRIPTION = "share of generated answers equal to the reference, white space at the ends aside"
HIGHER_IS_BETTER = True
score = mean_of_pairs(lambda prediction, reference: prediction.strip() == reference.strip())
