"""Settings that must divide the sides of every adapted layer, and the values that would."""

import math
from collections.abc import Sequence

from tunekit.adapters.method import Conflict
from tunekit.records import Target


def undivided(key: str, value: int, targets: Sequence[Target], *, inputs: bool) -> list[Conflict]:
    """A conflict where `value` does not divide every output (and with `inputs` every input) of the targets."""
    sides = {target.out_features for target in targets} | {t.in_features for t in targets if inputs}
    common = math.gcd(*sides)
    if common % value == 0:
        return []
    odd = [target.name for target in targets if target.out_features % value or (inputs and target.in_features % value)]
    how = f"{common} and its divisors fit all of them; or name fewer layers"
    return [Conflict(key, f"{value} does not divide the sides of '{odd[0]}' ({len(odd)} such layers)", how)]
