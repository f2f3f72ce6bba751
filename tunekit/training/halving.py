"""Successive halving of the trials of a sweep: the steps at which they are compared, and which of them continue.

Source: Jamieson and Talwalkar 2016, Non-stochastic best arm identification; with two as the factor.
"""

import math

from tunekit.artifacts.report.sweep_results import SweepResults


def rung_count(settings: int) -> int:
    """How many comparisons leave one of so many settings."""
    return max(settings, 1).bit_length() - 1


def rung_step(steps: int, rungs_left: int, multiple: int) -> int:
    """The step of a comparison after which `rungs_left` more divisions by two are possible, this one included.

    It is a multiple of `multiple`, at which a run is evaluated and can be resumed. `steps`: of the whole run.
    """
    return min(math.ceil(steps / 2**rungs_left / multiple) * multiple, steps)


def dropped_settings(results: SweepResults) -> list[str]:
    """The settings that end here: the worse half, without those that cannot be distinguished from the best one."""
    measured = [setting for setting in results.settings if setting.numbers]
    worse = measured[math.ceil(len(measured) / 2) :]
    by_loss = results.by == "eval.loss"
    return [
        setting.name
        for setting in worse
        if not (by_loss and setting.difference is not None and setting.difference.low <= 0)
    ]
