"""Checks settings that must divide the input and output sizes of every adapted layer, and suggests valid values."""

import math
from collections.abc import Sequence

from tunekit.adapters.method import Conflict
from tunekit.records import Target


def divisor_conflicts(key: str, value: int, targets: Sequence[Target], *, inputs: bool) -> list[Conflict]:
    """Returns a conflict if `value` does not divide the output size (and, with `inputs`, the input size) of every
    target."""
    sides = {target.out_features for target in targets} | {t.in_features for t in targets if inputs}
    common = math.gcd(*sides)
    if common % value == 0:
        return []
    failing = [
        target.name for target in targets if target.out_features % value or (inputs and target.in_features % value)
    ]
    how = f"use {common} or one of its divisors, which divide the sizes of all layers; or adapt fewer layers"
    return [Conflict(key, f"{value} does not divide the sizes of '{failing[0]}' ({len(failing)} such layers)", how)]
