"""Character error rate: the number of substituted, deleted and inserted characters, divided by the number of characters
in the references."""

from tunekit.metrics.spoken import LIBRARY as LIBRARY
from tunekit.metrics.spoken import error_rate

DESCRIPTION = "CER: changed, missing and surplus characters, divided by the characters in the references"
HIGHER_IS_BETTER = False
LEAVES_OUT = True  # pairs with an empty reference are left out and counted
score = error_rate("cer")
