"""Mean squared error of predicted scores, for rows that are labelled with numbers (regression)."""

from tunekit.metrics.outputs import mean_of_outputs, squared_error

DESCRIPTION = "mean squared error; with several numbers per row, the mean over the numbers"
HIGHER_IS_BETTER = False
NEEDS, from_sums = mean_of_outputs(squared_error)
