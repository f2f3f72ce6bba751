"""Word error rate: substituted, deleted and inserted words over all words of the references."""

from tunekit.metrics.spoken import LIBRARY as LIBRARY
from tunekit.metrics.spoken import error_rate

DESCRIPTION = "WER: changed, missing and surplus words over all words of the references"
HIGHER_IS_BETTER = False
LEAVES_OUT = True  # leaves out pairs with an empty reference, and counts them
score = error_rate("wer")
