"""Pearson's correlation of predicted scores with the rows' true numbers."""

from tunekit.metrics.outputs import mean_of_outputs, pearson

DESCRIPTION = "Pearson correlation of scores and numbers; for rows with several numbers, the mean over the numbers"
HIGHER_IS_BETTER = True
NEEDS, from_sums = mean_of_outputs(pearson)
