"""Mean negative log-likelihood of the supervised tokens, from its sum."""

from collections.abc import Callable, Mapping
from typing import Any

DESCRIPTION = "mean negative log-likelihood of the supervised tokens"
HIGHER_IS_BETTER = False


def mean_of(name: str) -> tuple[tuple[str, str], Callable[[Mapping[str, Any]], float]]:
    """NEEDS and `from_sums` of a metric: the sum `name` over the number of its units (tokens, labels, pairs)."""

    def from_sums(sums: Mapping[str, Any]) -> float:
        """Raises ValueError without units."""
        if sums["units"] <= 0:
            raise ValueError("no supervised tokens")
        return float(sums[name] / sums["units"])

    return (name, "units"), from_sums


NEEDS, from_sums = mean_of("loss")  # in nats a unit
