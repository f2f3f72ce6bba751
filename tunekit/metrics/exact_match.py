"""Share of answers equal to their reference, white space at both ends aside."""

from __future__ import annotations

from collections.abc import Sequence

DESCRIPTION = "share of generated answers equal to the reference, white space at the ends aside"
HIGHER_IS_BETTER = True


def score(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean of [p = r] over the pairs, 0 to 1. Raises ValueError without pairs, or where the lengths differ."""
    pairs = list(zip(predictions, references, strict=True))
    if not pairs:
        raise ValueError("no answers to compare")
    return sum(prediction.strip() == reference.strip() for prediction, reference in pairs) / len(pairs)
