"""exp of the mean loss, from its sum."""

from __future__ import annotations

import math

from tunekit.metrics import loss

DESCRIPTION = "exp of the loss"
COMPUTED_FROM = "loss"
HIGHER_IS_BETTER = False


def from_sums(loss_sum: float, correct_tokens: int, supervised_tokens: int) -> float:
    """exp(loss_sum / supervised_tokens), infinite where that overflows. Raises ValueError without tokens."""
    try:
        return math.exp(loss.from_sums(loss_sum, correct_tokens, supervised_tokens))
    except OverflowError:
        return math.inf
