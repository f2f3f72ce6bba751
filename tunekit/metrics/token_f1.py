"""Overlap of the answer's words with the reference's, whatever their order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

DESCRIPTION = "overlap of the answer's words with the reference's, as a mean F1"
HIGHER_IS_BETTER = True


def score(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean over the pairs of F1 = 2 common / (words of p + words of r), words as multisets; 1 where both have none.

    Words are runs of letters, digits and underscores, lower-cased.
    Raises: ValueError without pairs, or where the lengths differ.    Source: Rajpurkar et al. 2016, articles kept.
    """
    scores = [
        _f1(_words(prediction), _words(reference))
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    if not scores:
        raise ValueError("no answers to compare")
    return sum(scores) / len(scores)


def _f1(prediction: Counter[str], reference: Counter[str]) -> float:
    total = prediction.total() + reference.total()
    return 2 * (prediction & reference).total() / total if total else 1.0


def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.lower()))
