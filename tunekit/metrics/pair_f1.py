"""F1 of similar pairs with the best threshold of their similarity."""

from tunekit.metrics.pair_scores import best_f1, of_pairs

DESCRIPTION = "F1 of similar pairs with the best threshold of their similarity"
HIGHER_IS_BETTER = True
NEEDS, from_sums = of_pairs(best_f1)
