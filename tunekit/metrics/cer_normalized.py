"""Character error rate of normalised texts. The model's normaliser makes spellings uniform."""

from tunekit.metrics.cer import LIBRARY as LIBRARY
from tunekit.metrics.cer import score as score

DESCRIPTION = "CER after the model's normaliser, which removes differences of case, punctuation and spelling"
HIGHER_IS_BETTER = False
LEAVES_OUT = True
NORMALIZED = True  # `score` gets normalised texts
