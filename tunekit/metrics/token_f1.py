"""F1 of the words that an answer has in common with its reference, in any order."""

import string
from collections import Counter

from tunekit.metrics.pairs import MeanOfPairs

DESCRIPTION = "mean F1 of the words that answer and reference have in common"
HIGHER_IS_BETTER = True
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _f1(prediction: str, reference: str) -> float:
    """F1 = 2 common / (words of answer + words of reference). A word counts as often as it occurs. If neither text has
    words, the result is 1.
    Words are separated by white space, lower-cased, without ASCII punctuation.
    Source: Rajpurkar et al. 2016, but articles are not removed."""
    words, others = _words(prediction), _words(reference)
    total = words.total() + others.total()
    return 2 * (words & others).total() / total if total else 1.0


def _words(text: str) -> Counter[str]:
    return Counter(text.lower().translate(WITHOUT_PUNCTUATION).split())


score = MeanOfPairs(_f1)
