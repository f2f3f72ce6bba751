"""Share of answers that contain their reference, white space at both ends of the reference aside."""

from __future__ import annotations

from collections.abc import Sequence

DESCRIPTION = "share of generated answers that contain the reference"
HIGHER_IS_BETTER = True


def score(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean of [r in p] over the pairs, 0 to 1; an empty reference is contained in an empty answer only.

    Raises: ValueError without pairs, or where the lengths differ.
    """
    pairs = [
        (prediction.strip(), reference.strip()) for prediction, reference in zip(predictions, references, strict=True)
    ]
    if not pairs:
        raise ValueError("no answers to compare")
    return sum(reference in prediction if reference else not prediction for prediction, reference in pairs) / len(pairs)
