"""Word error rate: words to be changed, put in or left out, over those of the references."""

from __future__ import annotations

from collections.abc import Sequence

from tunekit.metrics.spoken import with_words

DESCRIPTION = "WER: changed, missing and surplus words over all words of the references"
HIGHER_IS_BETTER = False
LEAVES_OUT = True  # pairs whose reference is empty, which are counted


def score(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Errors of all pairs over words of all references; pairs whose reference has none are left out.

    Raises: ValueError where no pair is left.
    """
    import jiwer

    kept = with_words(predictions, references)
    return float(jiwer.wer([reference for _, reference in kept], [prediction for prediction, _ in kept]))
