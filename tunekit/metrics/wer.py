"""Word error rate: words to be changed, put in or left out, over those of the references."""

from tunekit.metrics.spoken import LIBRARY as LIBRARY
from tunekit.metrics.spoken import error_rate

DESCRIPTION = "WER: changed, missing and surplus words over all words of the references"
HIGHER_IS_BETTER = False
LEAVES_OUT = True  # pairs whose reference is empty, which are counted
score = error_rate("wer")
