"""Share of answers that equal their reference. White space at both ends is ignored."""

from tunekit.metrics.pairs import MeanOfPairs

DESCRIPTION = "share of generated answers equal to the reference, ignoring white space at both ends"
HIGHER_IS_BETTER = True
score = MeanOfPairs(lambda prediction, reference: prediction.strip() == reference.strip())
