"""Pearson's correlation of predicted scores with the rows' true numbers."""

from tunekit.metrics.outputs import mean_of_outputs, pearson

DESCRIPTION = "Pearson correlation of predicted and true numbers; with several numbers per row, the mean"
HIGHER_IS_BETTER = True
NEEDS, from_sums = mean_of_outputs(pearson)
