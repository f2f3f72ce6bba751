"""Successive halving of the trials of a sweep: the steps at which trials are compared, and which trials continue.

Source: Jamieson and Talwalkar 2016, Non-stochastic best arm identification; with a factor of two.
"""

import math
from collections.abc import Mapping, Sequence

from tunekit.artifacts.report.sweep_results import SweepResults


def rung_count(settings: int) -> int:
    """The number of comparisons until one of this many settings is left."""
    return max(settings, 1).bit_length() - 1


def rung_step(steps: int, rungs_left: int, multiple: int) -> int:
    """The step of the comparison that is followed by `rungs_left` - 1 more comparisons.

    It is a multiple of `multiple`: at these steps a run is evaluated and can be resumed. `steps`: the steps of the
    whole run.
    """
    return min(math.ceil(steps / 2**rungs_left / multiple) * multiple, steps)


def halving_seconds(parts: Mapping[str, Sequence[float]]) -> float:
    """The seconds of all trials if each comparison ends the half of them that is shortest. `parts`: the seconds of each
    trial before each comparison, and after the last one."""
    left, total = sorted(parts, key=lambda name: -sum(parts[name])), 0.0
    for number in range(max(map(len, parts.values()), default=0)):
        total += sum(parts[name][number] for name in left)
        left = left[: math.ceil(len(left) / 2)]
    return total


def dropped_settings(results: SweepResults, most: int | None = None) -> list[str]:
    """The settings that end at this comparison: the worse half, except settings that cannot be distinguished from the
    best one. With `most`: all settings except the best `most`."""
    measured = [setting for setting in results.settings if setting.numbers]
    half = math.ceil(len(measured) / 2)
    unclear = {setting.name for setting in results.unclear} if most is None else set()
    return [setting.name for setting in measured[half if most is None else most :] if setting.name not in unclear]
