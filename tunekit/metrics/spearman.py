"""Spearman's correlation: the correlation between the ranks of predicted scores and the ranks of true numbers."""

from tunekit.metrics.outputs import mean_of_outputs, spearman

DESCRIPTION = "Spearman correlation of predicted and true numbers; with several numbers per row, the mean"
HIGHER_IS_BETTER = True
NEEDS, from_sums = mean_of_outputs(spearman)
