"""Character error rate: characters to be changed, put in or left out, over those of the references."""

from __future__ import annotations

from collections.abc import Sequence

from tunekit.metrics.spoken import with_words

DESCRIPTION = "CER: changed, missing and surplus characters over all characters of the references"
HIGHER_IS_BETTER = False
LEAVES_OUT = True  # pairs whose reference is empty, which are counted


def score(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Errors of all pairs over characters of all references; pairs whose reference has none are left out.

    Raises: ValueError where no pair is left.
    """
    import jiwer

    kept = with_words(predictions, references)
    return float(jiwer.cer([reference for _, reference in kept], [prediction for prediction, _ in kept]))
