"""Perplexity: exp of the mean loss."""

import math
from collections.abc import Mapping
from typing import Any

from tunekit.metrics import loss

DESCRIPTION = "exp of the loss"
NEEDS = loss.NEEDS
HIGHER_IS_BETTER = False


def from_sums(sums: Mapping[str, Any]) -> float:
    """exp(sums["loss"] / sums["units"]), or infinity if this overflows. Raises ValueError if there are no tokens."""
    try:
        return math.exp(loss.from_sums(sums))
    except OverflowError:
        return math.inf
