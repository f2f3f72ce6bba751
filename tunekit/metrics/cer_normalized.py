"""Character error rate of texts after the model's own normaliser, which makes spellings uniform."""

from tunekit.metrics.cer import LIBRARY as LIBRARY
from tunekit.metrics.cer import score as score

DESCRIPTION = "CER of normalised texts (without differences in case, punctuation and spelling)"
HIGHER_IS_BETTER = False
LEAVES_OUT = True
NORMALIZED = True  # `score` gets normalised texts
