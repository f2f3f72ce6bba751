"""Successive halving of the trials of a sweep: the steps at which trials are compared, and which trials continue.
sweep.py calls `dropped_settings` at each comparison; rungs.py keeps the record.

Source: Jamieson and Talwalkar 2016, Non-stochastic best arm identification; with a factor of two.
"""

import math
from collections.abc import Mapping, Sequence

from tunekit.artifacts.report.sweep_results import SweepResults


def rung_count(settings: int) -> int:
    """The number of comparisons that halve `settings` settings until one is left."""
    return max(settings, 1).bit_length() - 1


def rung_step(steps: int, rungs_left: int, multiple: int) -> int:
    """The training step of a comparison. `rungs_left`: the number of comparisons left, including this one.

    The step is a multiple of `multiple`, so that the run is evaluated there and can be resumed. `steps`: all steps of
    the run.
    """
    return min(math.ceil(steps / 2**rungs_left / multiple) * multiple, steps)


def halving_seconds(parts: Mapping[str, Sequence[float]]) -> float:
    """The seconds of all trials in the slowest case: each comparison ends the shorter half of the trials. `parts`: the
    seconds of each trial before each comparison, and after the last comparison."""
    left, total = sorted(parts, key=lambda name: -sum(parts[name])), 0.0
    for number in range(max(map(len, parts.values()), default=0)):
        total += sum(parts[name][number] for name in left)
        left = left[: math.ceil(len(left) / 2)]
    return total


def dropped_settings(results: SweepResults, most: int | None = None) -> list[str]:
    """The settings whose training ends at this comparison: the worse half, except complete settings that are not
    clearly worse than the best one. With `most`: all except the `most` best settings."""
    measured = [setting for setting in results.settings if setting.numbers]
    if most is not None:
        return [setting.name for setting in measured[most:]]
    worse = measured[math.ceil(len(measured) / 2) :]
    return [each.name for each in worse if each.clear or each.difference is None or not each.is_complete]
