"""The record of a sweep's comparisons by successive halving (rungs.json), and their time limits. halving.py has the
rule."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunekit.artifacts.checkpoint import list_checkpoints
from tunekit.artifacts.report.sweep_results import HALVED, SweepResults
from tunekit.artifacts.report.values import RunValues, Values, damage_named, run_values
from tunekit.artifacts.run import read_json
from tunekit.errors import RunFolderError
from tunekit.files.durable import write_json
from tunekit.training.automatic import most_that_fit
from tunekit.training.halving import rung_count, rung_step
from tunekit.training.timing import Costs
from tunekit.training.trials import Trial

RUNGS_NAME = "rungs.json"


@dataclass
class Limits:
    """The time limit of `sweep --auto`, and the measured costs from which its values were chosen. `pace`: the seconds
    of training before the last comparison, as a multiple of its predicted seconds."""

    deadline: float  # of time.monotonic
    costs: Costs | None = None
    pace: float = 1.0

    def parts(self, trials: Sequence[Trial], left: int) -> dict[str, list[float]]:
        """For each setting with planned trials, the predicted seconds before its next comparison, between its further
        comparisons, and after the last one. `left`: the number of comparisons left, including this one."""
        parts: dict[str, list[float]] = {}
        for trial in trials:
            if trial.plan is not None and self.costs is not None:
                ends = [rung_of(trial, number) or trial.steps for number in range(left, 0, -1)]
                seconds = self.costs.of_parts(trial.plan, trial.recipe.loaded.recipe, ends)
                parts[trial.recipe.setting] = [
                    sum(pair)
                    for pair in zip(seconds, parts.get(trial.recipe.setting, [0.0] * len(seconds)), strict=True)
                ]
        return parts

    def set_pace(self, seconds: float, trials: Sequence[Trial], left: int, *, first: bool) -> None:
        """Compare the seconds of training before a comparison with their prediction. `left`: the number of comparisons
        left, including this one. `first`: this is the first comparison."""
        predicted = 0.0
        for trial in trials:
            if trial.plan is not None and self.costs is not None and trial.error is None:
                begin = 0 if first else rung_of(trial, left + 1) or trial.steps
                end = rung_of(trial, left) or trial.steps
                recipe = trial.recipe.loaded.recipe
                predicted += (
                    self.costs.prepare + self.costs.of_steps(trial.plan, recipe, begin, end) if end > begin else 0
                )
        self.pace = seconds / predicted if predicted > 0 else self.pace


def earlier_rungs(folder: Path, trials: Sequence[Trial]) -> list[list[str]]:
    """For each earlier comparison, the names of the settings whose training ended there. Also marks the trials of these
    settings as ended.

    Raises: RunFolderError if the earlier comparisons had different trials.
    """
    earlier = read_json(folder / RUNGS_NAME)
    if earlier is None:
        return []
    rungs = earlier.get("rungs") if isinstance(earlier, dict) and "settings" in earlier else None
    if not isinstance(rungs, list) or not all(isinstance(names, list) for names in rungs):
        raise RunFolderError(f"{folder / RUNGS_NAME} is damaged", "choose another output.dir")
    if earlier["settings"] != setting_names(trials):
        what = f"{folder / RUNGS_NAME}: halving compared the trials of a different sweep"
        raise RunFolderError(what, "restore the values of that sweep, or choose another output.dir")
    for trial in trials:
        trial.ended = any(trial.recipe.setting in names for names in rungs)
    return rungs


def setting_names(trials: Sequence[Trial]) -> list[str]:
    """The names of the settings, sorted."""
    return sorted({trial.recipe.setting for trial in trials})


def most_settings(limits: Limits | None, results: SweepResults, trials: Sequence[Trial], left: int) -> int | None:
    """The maximum number of settings that `sweep --auto` continues after a comparison: at most half of them, and only
    as many as can finish before the deadline. None without `--auto`. `left`: the number of comparisons left, including
    this one."""
    if limits is None:
        return None
    order = [setting.name for setting in results.settings if setting.numbers]
    if limits.costs is None:
        return math.ceil(len(order) / 2)
    parts = limits.parts(trials, left)
    predicted = {name: parts[name][1:] if name in parts else [0.0] for name in order}
    return most_that_fit(order, predicted, (limits.deadline - time.monotonic()) / limits.pace)


def rung_of(trial: Trial, left: int) -> int | None:
    """The step at which a trial is compared next; None if its run ends before. `left`: the number of comparisons
    left."""
    if trial.plan is None or trial.planned is None:
        return None
    every = trial.recipe.loaded.recipe.training.eval_steps
    sampling = trial.planned.rows.objective.loss.updates_per_sampling
    step = rung_step(trial.steps, left, math.lcm(every, sampling))
    return step if step < trial.steps else None


def crowded_rungs(trials: Sequence[Trial]) -> list[str]:
    """A warning if two comparisons of a trial would be at one step, without training between them."""
    rungs = rung_count(len(setting_names(trials)))
    for trial in trials:
        steps = [step for left in range(rungs, 0, -1) if (step := rung_of(trial, left)) is not None]
        if len(set(steps)) < len(steps):
            wanted = max(trial.steps // 2**rungs, 1)
            what = f"{trial.recipe.name} is compared at the steps {', '.join(map(str, steps))} of {trial.steps}"
            return [f"{what}: some comparisons follow no further training; lower training.eval_steps to {wanted}"]
    return []


def end_paused(trials: Sequence[Trial]) -> None:
    """Mark these paused trials as ended, because the comparisons (successive halving) dropped them."""
    for trial in trials:
        if not trial.ended:
            step = max(step for step, _ in list_checkpoints(trial.path / "checkpoints"))
            ended = {"exit_code": 143, "reason": f"{HALVED} after step {step}", "finished": False}
            write_json(trial.path / "status.json", ended)
            trial.ended = True


def runs_by_setting(trials: Sequence[Trial]) -> dict[str, list[RunValues]]:
    """For each setting, the values in the run folders of its trials. The settings that halving ended come last: first
    those of the last comparison, each comparison's best setting first."""
    runs: dict[str, list[RunValues]] = {}
    for trial in trials:
        with damage_named(trial.path):
            runs.setdefault(trial.recipe.setting, []).append(run_values(trial.path))
    earlier = read_json(trials[0].path.parent / RUNGS_NAME) if trials else None
    rungs = Values(earlier).items_of("rungs") if isinstance(earlier, dict) else []
    ended = [name for names in reversed(rungs) if isinstance(names, list) for name in map(str, names)]
    first = (name for name in runs if name not in ended)
    return {name: runs[name] for name in (*first, *ended) if name in runs}
