"""Average precision of pairs by their similarity."""

from tunekit.metrics.pair_scores import average_precision, of_pairs

DESCRIPTION = "average precision of pairs by their similarity"
HIGHER_IS_BETTER = True
NEEDS, from_sums = of_pairs(average_precision)
