"""Word error rate of normalised texts. The model's normaliser makes spellings uniform."""

from tunekit.metrics.wer import LIBRARY as LIBRARY
from tunekit.metrics.wer import score as score

DESCRIPTION = "WER after the model's normaliser, which removes differences of case, punctuation and spelling"
HIGHER_IS_BETTER = False
LEAVES_OUT = True
NORMALIZED = True  # `score` gets normalised texts
