"""Word error rate of texts after the model's own normaliser, which makes spellings uniform."""

from tunekit.metrics.wer import LIBRARY as LIBRARY
from tunekit.metrics.wer import score as score

DESCRIPTION = "WER of normalised texts (without differences in case, punctuation and spelling)"
HIGHER_IS_BETTER = False
LEAVES_OUT = True
NORMALIZED = True  # `score` gets normalised texts
