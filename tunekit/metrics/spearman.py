"""Spearman's correlation: the correlation of the ranks of predicted scores with the ranks of the rows' true numbers."""

from tunekit.metrics.outputs import mean_of_outputs, spearman

DESCRIPTION = "Spearman correlation of scores and numbers; for rows with several numbers, the mean over the numbers"
HIGHER_IS_BETTER = True
NEEDS, from_sums = mean_of_outputs(spearman)
