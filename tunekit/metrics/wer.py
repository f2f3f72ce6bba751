"""Word error rate: the number of substituted, deleted and inserted words, divided by the number of words in the
references."""

from tunekit.metrics.spoken import LIBRARY as LIBRARY
from tunekit.metrics.spoken import error_rate

DESCRIPTION = "WER: changed, missing and surplus words, divided by the words in the references"
HIGHER_IS_BETTER = False
LEAVES_OUT = True  # pairs with an empty reference are left out and counted
score = error_rate("wer")
