"""Word error rate of texts whose spellings were made alike, by the model's own normaliser."""

from tunekit.metrics.wer import LIBRARY as LIBRARY
from tunekit.metrics.wer import score as score

DESCRIPTION = "WER after the model's normaliser: case, punctuation and spellings count no more"
HIGHER_IS_BETTER = False
LEAVES_OUT = True
NORMALIZED = True  # the texts that are given to `score` are
