"""The comparisons of a sweep with successive halving: at which steps they are, and which lanes (trials) they end."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunekit.artifacts.checkpoint import list_checkpoints
from tunekit.artifacts.report.sweep_results import SweepResults
from tunekit.artifacts.report.values import RunValues, damage_named, run_values
from tunekit.artifacts.run import read_json
from tunekit.errors import RunFolderError
from tunekit.files.durable import write_json
from tunekit.training.automatic import most_that_fit
from tunekit.training.halving import rung_step
from tunekit.training.lane import Lane
from tunekit.training.timing import Costs

RUNGS_NAME = "rungs.json"


@dataclass
class Limits:
    """The time limit of `--auto`, and the costs that were measured to choose its values."""

    deadline: float  # of time.monotonic
    costs: Costs | None = None


def earlier_rungs(folder: Path, lanes: Sequence[Lane]) -> list[list[str]]:
    """The settings that each earlier comparison ended. Marks the lanes of these settings as ended.

    Raises: RunFolderError if other trials were compared.
    """
    earlier = read_json(folder / RUNGS_NAME)
    if earlier is None:
        return []
    if earlier["settings"] != setting_names(lanes):
        what = f"{folder / RUNGS_NAME}: halving compared other trials"
        raise RunFolderError(what, "write the same values, or choose another output.dir")
    rungs: list[list[str]] = earlier["rungs"]
    for lane in lanes:
        lane.ended = any(lane.trial.setting in names for names in rungs)
    return rungs


def setting_names(lanes: Sequence[Lane]) -> list[str]:
    """The names of the settings, sorted."""
    return sorted({lane.trial.setting for lane in lanes})


def most_settings(limits: Limits | None, results: SweepResults, lanes: Sequence[Lane], left: int) -> int | None:
    """How many settings `--auto` continues after a comparison: at most half of them, and only as many as can end in
    time. None without --auto. `left`: the number of remaining comparisons, this one included."""
    if limits is None:
        return None
    order = [setting.name for setting in results.settings if setting.numbers]
    if limits.costs is None:
        return math.ceil(len(order) / 2)
    parts: dict[str, list[float]] = {}
    for lane in lanes:
        if lane.plan is not None:
            ends = [rung_of(lane, number) or lane.steps for number in range(left, 0, -1)]
            parts[lane.trial.setting] = limits.costs.of_parts(lane.plan, lane.trial.loaded.recipe, ends)[1:]
    return most_that_fit(order, {name: parts.get(name, [0.0]) for name in order}, limits.deadline - time.monotonic())


def rung_of(lane: Lane, left: int) -> int | None:
    """The step of a lane's next comparison; None if no comparison is left before the end of its run."""
    if lane.plan is None or lane.prepared is None:
        return None
    every = lane.trial.loaded.recipe.training.eval_steps
    sampling = lane.prepared.rows.objective.loss.updates_per_sampling
    step = rung_step(lane.steps, left, math.lcm(every, sampling))
    return step if step < lane.steps else None


def end_paused(lanes: Sequence[Lane]) -> None:
    """Mark these paused lanes (trials) as ended by halving."""
    for lane in lanes:
        if not lane.ended:
            step = max(step for step, _ in list_checkpoints(lane.path / "checkpoints"))
            write_json(lane.path / "status.json", {"exit_code": 143, "reason": f"ended by halving after step {step}"})
            lane.ended = True


def runs_by_setting(lanes: Sequence[Lane]) -> dict[str, list[RunValues]]:
    """The values of the runs of each setting."""
    runs: dict[str, list[RunValues]] = {}
    for lane in lanes:
        with damage_named(lane.path):
            runs.setdefault(lane.trial.setting, []).append(run_values(lane.path))
    return runs
