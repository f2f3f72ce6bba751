"""The mean negative log-likelihood of the supervised tokens, computed from its sum."""

import math
from collections.abc import Callable, Mapping
from typing import Any

DESCRIPTION = "mean negative log-likelihood of the supervised tokens"
HIGHER_IS_BETTER = False


def mean_of(name: str, counted: str = "units") -> tuple[tuple[str, str], Callable[[Mapping[str, Any]], float]]:
    """The constant NEEDS and the function `from_sums` of a metric that is a mean: the sum `name` divided by a number of
    units (tokens, labels, pairs). `counted`: the sum that counts the units. It is not always `units`, because some
    metrics have a value for only some units."""

    def from_sums(sums: Mapping[str, Any]) -> float:
        """The mean; NaN if no unit has a value. Raises ValueError without units."""
        if sums["units"] <= 0:
            raise ValueError("no supervised tokens")
        count = sums.get(counted, sums["units"])
        return float(sums[name] / count) if count else math.nan

    return (name, "units"), from_sums


NEEDS, from_sums = mean_of("loss")  # in nats per unit
