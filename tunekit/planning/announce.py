"""Prints a summary of a sweep before its first trial: the time and memory of each trial, and the time that the sweep
saves."""

import gc
from collections.abc import Sequence

from tunekit.console import Console
from tunekit.console.loudness import is_quiet
from tunekit.console.text import time_text
from tunekit.errors import Stopped, TunekitError
from tunekit.machine.memory import reset_host_peak
from tunekit.planning.lanes import LanePass, count_bases, make_passes, pass_notes
from tunekit.records import bytes_text
from tunekit.training.halving import rung_count
from tunekit.training.lane import Lane, SharedBase
from tunekit.training.rungs import Limits, rung_of
from tunekit.training.timing import TimeForecast, forecast, measure_costs


def announce(
    lanes: Sequence[Lane], base: SharedBase, console: Console, settings: int, limits: Limits | None, start: float
) -> None:
    """Measure a few steps of one trial. Then print the trials, their predicted time and memory, and the time that the
    sweep saves.

    `settings`: the number of settings that successive halving compares; 0 without halving. `start`: the seconds that
    Python and its libraries needed to start.
    """
    planned_trials, passes = [(lane, lane.plan) for lane in lanes if lane.plan is not None], make_passes(lanes)
    if len(planned_trials) < len(lanes):
        console.info(f"{len(lanes) - len(planned_trials)} of {len(lanes)} trials have ended already")
    if not planned_trials:
        return
    forecasts = None if limits is not None else _forecast(passes, base, settings, start)
    seconds = {} if forecasts is None else forecasts.trials
    head = ["trial", "steps", "trained parameters", "predicted peak", *(["predicted time"] if seconds else [])]
    lines: list[list[object]] = [
        [lane.trial.name, plan.steps, plan.trainable_parameters, bytes_text(plan.peak_bytes.total),
         *([time_text(seconds[lane.trial.name]) if lane.trial.name in seconds else "–"] if seconds else [])]
        for lane, plan in planned_trials
    ]  # fmt: skip
    if not is_quiet():  # a plan is not a result
        console.table(head, lines)
    steps, together = sum(plan.steps for _, plan in planned_trials), any(each.together for each in passes)
    peak = bytes_text(max(each.peak_bytes for each in passes))
    console.info(f"{summary(len(planned_trials), steps, count_bases(passes), together)}; predicted peak {peak}")
    console.info(*pass_notes(passes))
    console.info(*([] if forecasts is None else forecasts.lines()))


def summary(trials: int, steps: int, bases: int, together: bool) -> str:
    """A text with the number of trials and steps, and how often the base is loaded. `together`: some trials run
    together."""
    if trials == 1:
        return f"1 trial, {steps:,} steps"
    loads = "once" if bases == 1 else f"{bases} times"
    how = "" if together else " that run one after another"
    return f"{trials} trials{how}, {steps:,} steps in all; the base is loaded {loads} instead of {trials} times"


def _forecast(passes: Sequence[LanePass], base: SharedBase, settings: int, start: float) -> TimeForecast | None:
    """Predict the time of the trials that use the first base. For this, a few steps of one trial are measured: the
    trial with the most trained parameters.

    None if the base is not shared, if there is only one trial, or if these steps fail. The trial itself then reports
    the failure later.
    """
    key = passes[0].lanes[0].base_key
    lanes = [lane for each in passes if each.lanes[0].base_key == key for lane in each.lanes]
    lane = max(lanes, key=lambda lane: lane.plan.trainable_parameters if lane.plan else 0)
    if key is None or lane.plan is None or lane.planned is None or len(lanes) < 2:
        return None
    base.use_for(lane)
    try:
        costs = measure_costs(lane.session, lane.plan, lane.planned, base.load)
    except Stopped:
        raise
    except TunekitError:
        return None
    finally:
        gc.collect()
        reset_host_peak()
    if costs is None:
        return None
    ends = [{each.trial.name: rung_of(each, left) for each in lanes} for left in range(rung_count(settings), 0, -1)]
    gain = passes[0].gain if passes[0].together else 1.0
    return forecast(lanes, lane, costs, start, ends, gain)
