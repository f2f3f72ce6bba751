"""Character error rate: substituted, deleted and inserted characters over all characters of the references."""

from tunekit.metrics.spoken import LIBRARY as LIBRARY
from tunekit.metrics.spoken import error_rate

DESCRIPTION = "CER: changed, missing and surplus characters over all characters of the references"
HIGHER_IS_BETTER = False
LEAVES_OUT = True  # pairs with an empty reference are left out and counted
score = error_rate("cer")
