"""Prints a summary of a sweep before its first trial: the time and memory of each trial, and the time that the sweep
saves."""

import gc
from collections.abc import Sequence

from tunekit.console import Console
from tunekit.console.loudness import is_quiet
from tunekit.console.text import time_text
from tunekit.errors import Stopped, TunekitError
from tunekit.machine.memory import reset_host_peak
from tunekit.planning.trial_groups import TrialGroup, count_bases, group_notes, group_trials
from tunekit.records import bytes_text
from tunekit.training.halving import rung_count
from tunekit.training.rungs import Limits, rung_of
from tunekit.training.timing import TimeForecast, forecast, measure_costs
from tunekit.training.trials import SharedBase, Trial


def announce(
    trials: Sequence[Trial], base: SharedBase, console: Console, settings: int, limits: Limits | None, start: float
) -> None:
    """Measure a few steps of one trial. Then print the trials, their predicted time and memory, and the time that the
    sweep saves.

    `settings`: the number of settings that successive halving compares; 0 without halving. `start`: the seconds that
    Python and its libraries needed to start.
    """
    planned_trials, groups = [(trial, trial.plan) for trial in trials if trial.plan is not None], group_trials(trials)
    if len(planned_trials) < len(trials):
        console.info(f"{len(trials) - len(planned_trials)} of {len(trials)} trials have ended already")
    if not planned_trials:
        return
    forecasts = None if limits is not None else _forecast(groups, base, settings, start)
    seconds = {} if forecasts is None else forecasts.trials
    head = ["trial", "steps", "trained parameters", "predicted peak", *(["predicted time"] if seconds else [])]
    lines: list[list[object]] = [
        [trial.recipe.name, plan.steps, plan.trainable_parameters, bytes_text(plan.peak_bytes.total),
         *([time_text(seconds[trial.recipe.name]) if trial.recipe.name in seconds else "–"] if seconds else [])]
        for trial, plan in planned_trials
    ]  # fmt: skip
    if not is_quiet():  # a plan is not a result
        console.table(head, lines)
    steps, together = sum(plan.steps for _, plan in planned_trials), any(each.together for each in groups)
    peak = bytes_text(max(each.peak_bytes for each in groups))
    console.info(f"{summary(len(planned_trials), steps, count_bases(groups), together)}; predicted peak {peak}")
    console.info(*group_notes(groups))
    console.info(*([] if forecasts is None else forecasts.lines()))


def summary(trials: int, steps: int, bases: int, together: bool) -> str:
    """A text with the number of trials and steps, and how often the base is loaded. `together`: some trials run
    together."""
    if trials == 1:
        return f"1 trial, {steps:,} steps"
    loads = "once" if bases == 1 else f"{bases} times"
    how = "" if together else " that run one after another"
    return f"{trials} trials{how}, {steps:,} steps in all; the base is loaded {loads} instead of {trials} times"


def _forecast(groups: Sequence[TrialGroup], base: SharedBase, settings: int, start: float) -> TimeForecast | None:
    """Predict the time of the trials that use the first base. For this, a few steps of one trial are measured: the
    trial with the most trained parameters.

    None if the base is not shared, if there is only one trial, or if these steps fail. The trial itself then reports
    the failure later.
    """
    key = groups[0].trials[0].base_key
    trials = [trial for each in groups if each.trials[0].base_key == key for trial in each.trials]
    trial = max(trials, key=lambda trial: trial.plan.trainable_parameters if trial.plan else 0)
    if key is None or trial.plan is None or trial.planned is None or len(trials) < 2:
        return None
    base.use_for(trial)
    try:
        costs = measure_costs(trial.session, trial.plan, trial.planned, base.load)
    except Stopped:
        raise
    except TunekitError:
        return None
    finally:
        gc.collect()
        reset_host_peak()
    if costs is None:
        return None
    ends = [{each.recipe.name: rung_of(each, left) for each in trials} for left in range(rung_count(settings), 0, -1)]
    gain = groups[0].gain if groups[0].together else 1.0
    return forecast(trials, trial, costs, start, ends, gain)
