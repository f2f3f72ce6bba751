"""Accuracy of pairs with the best threshold of their similarity."""

from tunekit.metrics.pair_scores import best_accuracy, of_pairs

DESCRIPTION = "accuracy of pairs with the best threshold of their similarity"
HIGHER_IS_BETTER = True
NEEDS, from_sums = of_pairs(best_accuracy)
