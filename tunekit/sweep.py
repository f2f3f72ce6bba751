"""`tunekit sweep`: trains the trials of a recipe one after another over one loaded base, and compares their results.

A trial is a run like any other, in its own folder. Its result has the same bytes as that of `tunekit train`.
"""

import gc
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tunekit.artifacts.checkpoint import list_checkpoints
from tunekit.artifacts.report.html import html_page
from tunekit.artifacts.report.sweep_results import SweepResults, sweep_results
from tunekit.artifacts.report.values import RunValues, damage_named, run_values
from tunekit.artifacts.run import RUN_SIGNS, read_json, refuse_old_run
from tunekit.console import Console
from tunekit.console.text import time_text
from tunekit.data.reading.replaced import refuse_to_replace
from tunekit.errors import InputError, NumericsError, Problem, RecipeError, RunFolderError, Stopped, TunekitError
from tunekit.files.durable import json_result, make_folder, write_json, write_text
from tunekit.files.lock import FolderLock
from tunekit.machine.devices import deterministic_kernels, make_devices
from tunekit.machine.memory import reset_host_peak
from tunekit.machine.signals import StopSignals
from tunekit.planning.lanes import LanePass, count_bases, make_passes, pass_notes
from tunekit.recipe.bases.paths import relative_to
from tunekit.recipe.reading.trials import LoadedSweep
from tunekit.records import bytes_text
from tunekit.train import load_base, plan_session, session_steps
from tunekit.training import run_files
from tunekit.training.engines.together import Together
from tunekit.training.engines.window import LoopSteps
from tunekit.training.halving import dropped_settings, rung_count, rung_step
from tunekit.training.lane import Lane, SharedBase, run_lanes
from tunekit.training.session import Session

SWEEP_NAME, PAGE_NAME, RUNGS_NAME = "sweep.json", "sweep.html", "rungs.json"


def sweep_verb(sweep: LoadedSweep, resume: bool, json_file: str | None) -> None:
    """Train all trials that are not finished, and write their comparison below output.dir.

    Raises: TunekitError if a trial could not be trained to its end; a trial with invalid numbers is a result.
    """
    refuse_to_replace("--json", json_file, sweep.loaded)
    write_result, folder = json_result(json_file), Path(sweep.loaded.recipe.output.dir)
    devices, console = make_devices(), Console(json_file=json_file)
    try:
        if devices.world > 1:
            raise InputError("sweep computes in one process", "start it without torchrun")
        console.info(*sweep.loaded.rewrites)
        with StopSignals() as signals:
            joined = sweep.section.joined
            sessions = [Session(trial.loaded, devices, console, signals) for trial in sweep.trials]
            lanes = [Lane(*pair, joined=joined) for pair in zip(sweep.trials, sessions, strict=True)]
            lock = _open(folder, lanes, resume)
            try:
                halves = sweep.section.strategy == "halving"
                rungs = _earlier_rungs(folder, lanes) if halves and resume else []
                with signals.at_once("before training began; nothing was trained"):
                    _plan_lanes(lanes, console, resume)
                base = SharedBase(load_base)
                if halves:
                    _train_by_halves(sweep, lanes, base, console, resume, rungs)
                if not _unfinished(lanes):
                    _train_lanes(lanes, base, console, resume)
                results = _compare(sweep, folder, lanes)
            finally:
                lock.release()
        console.table(*results.table())
        console.info(results.verdict())
        if results.best is not None:
            recipe = relative_to(results.best.runs[0].path / "recipe.yaml")
            console.info(f"page: {folder / PAGE_NAME}", f"the recipe of the best trial: {recipe}")
        write_result(read_json(folder / SWEEP_NAME))
    finally:
        devices.close()
    _raise_errors(lanes)


def _open(folder: Path, lanes: Sequence[Lane], resume: bool) -> FolderLock:
    """Lock the folder of the sweep. Raises: RunFolderError if it or a trial's folder cannot be used."""
    refuse_old_run(folder)
    for lane in lanes:
        if not resume and any((lane.path / sign).exists() for sign in RUN_SIGNS):
            raise RunFolderError(f"{lane.path} already holds a run", "add --resume, or choose another output.dir")
    for path in (*reversed(folder.absolute().parents), folder):
        if not path.exists():
            make_folder(path)
    return FolderLock(folder)


def _plan_lanes(lanes: Sequence[Lane], console: Console, resume: bool) -> None:
    """Plan all trials before the first one is trained, and print what will happen.

    Raises: TunekitError with the problems of all trials.
    """
    threads, errors = torch.get_num_threads(), list[TunekitError]()
    console.info(f"planning {len(lanes)} trials ...")
    for lane in lanes:
        torch.set_num_threads(threads)
        lane.ended = lane.ended or (resume and _has_ended(lane))
        if lane.ended:
            continue
        try:
            previous = run_files.choice_in(lane.path) if resume else None
            lane.plan, lane.prepared = plan_session(lane.session, previous)
        except TunekitError as error:
            named = [replace(each, what=f"{each.what} ({lane.trial.name})") for each in error.problems]
            errors.append(type(error).of(named))
    if errors:
        raise type(errors[0]).of([problem for error in errors for problem in error.problems])
    _announce(lanes, make_passes(lanes), console)


def _has_ended(lane: Lane) -> bool:
    """Whether the run is finished, or ended with invalid numbers, which a resume would only repeat."""
    status = read_json(lane.path / "status.json")
    failed = isinstance(status, dict) and status.get("exit_code") == NumericsError.exit_code
    return failed or run_files.is_run_finished(lane.session)


def _announce(lanes: Sequence[Lane], passes: Sequence[LanePass], console: Console) -> None:
    """Print the trials, and what the sweep saves."""
    planned = [(lane, lane.plan) for lane in lanes if lane.plan is not None]
    head = ["trial", "steps", "trained parameters", "predicted peak"]
    console.table(head, [
        [lane.trial.name, plan.steps, plan.trainable_parameters, bytes_text(plan.peak_bytes.total)]
        for lane, plan in planned
    ])  # fmt: skip
    if len(planned) < len(lanes):
        console.info(f"{len(lanes) - len(planned)} of {len(lanes)} trials have ended already")
    if not planned:
        return
    steps, bases = sum(plan.steps for _, plan in planned), count_bases(passes)
    loads = "once" if bases == 1 else f"{bases} times"
    how = "" if any(each.together for each in passes) else ", one after another"
    console.info(
        f"{len(planned)} trials{how}, {steps:,} steps in all; the base is loaded {loads} instead of "
        f"{len(planned)} times; predicted peak {bytes_text(max(each.peak_bytes for each in passes))}"
    )
    console.info(*pass_notes(passes))


def _train_lanes(
    lanes: Sequence[Lane],
    base: SharedBase,
    console: Console,
    resume: bool,
    ends: Mapping[str, int | None] | None = None,
) -> None:
    """Train the lanes pass by pass. A lane that fails does not end the others. `ends`: the step after which each trial
    pauses, with a checkpoint.

    Raises: Stopped after a stop signal.
    """
    seconds, steps = 0.0, 0
    passes = make_passes(lanes)
    groups = [(group, each.joined) for each in passes for group in each.groups()]
    for number, (group, choice) in enumerate(groups):
        base.use_for(group[0])
        left = sum(lane.steps for each, _ in groups[number:] for lane in each)
        time_left = f", about {time_text(seconds / steps * left)} left" if steps and ends is None else ""
        names = ", ".join(lane.trial.name for lane in group)
        numbers = ", ".join(str(lanes.index(lane) + 1) for lane in group)
        console.info("", f"trial {numbers} of {len(lanes)}: {names}{time_left}")
        started = time.monotonic()
        with deterministic_kernels(group[0].trial.loaded.recipe.training.deterministic):
            ends_of = [None if ends is None else ends[lane.trial.name] for lane in group]
            loops = (_lane_steps(*pair, base, resume, len(group) > 1) for pair in zip(group, ends_of, strict=True))
            run_lanes(loops, Together(lambda: base.base, choice, console.warn))
        seconds, steps = seconds + time.monotonic() - started, steps + sum(lane.steps for lane in group)
        gc.collect()
        reset_host_peak()


def _lane_steps(lane: Lane, end: int | None, base: SharedBase, resume: bool, named: bool) -> LoopSteps:
    """Train one lane to its end, or to the step `end`, and yield its windows. An error of the lane is stored in it.
    `named`: its lines begin with its name.

    Raises: Stopped after a stop signal.
    """
    resume = resume or lane.begun
    if end is not None and any(step >= end for step, _ in list_checkpoints(lane.path / "checkpoints")):
        return
    console = lane.session.console.named(lane.trial.name) if named else lane.session.console
    seconds = {} if lane.begun else lane.session.seconds
    session = replace(lane.session, last_step=end, seconds=seconds, console=console)
    assert lane.plan is not None
    assert lane.prepared is not None
    planned, lane.begun, lane.ended = (lane.plan, lane.prepared), True, True
    try:
        with run_files.locked_folder(session, lane.path, resume, overwrite=False):
            yield from session_steps(session, resume, planned, base.load)
    except Stopped:
        lane.ended = False  # it pauses
        if session.signals.requested is not None:
            raise
    except TunekitError as error:
        lane.session.console.warn(f"{lane.trial.name}: {error}")
        lane.error = type(error).of(error.problems)  # without the traceback, which would keep the lane's tensors
    if lane.ended:
        lane.prepared = None


def _earlier_rungs(folder: Path, lanes: Sequence[Lane]) -> list[list[str]]:
    """The settings that earlier comparisons ended, for each comparison. Their lanes have ended.

    Raises: RunFolderError if other trials were compared.
    """
    earlier = read_json(folder / RUNGS_NAME)
    if earlier is None:
        return []
    if earlier["settings"] != _settings(lanes):
        what = f"{folder / RUNGS_NAME}: halving compared other trials"
        raise RunFolderError(what, "write the same values, or choose another output.dir")
    rungs: list[list[str]] = earlier["rungs"]
    for lane in lanes:
        lane.ended = any(lane.trial.setting in names for names in rungs)
    return rungs


def _settings(lanes: Sequence[Lane]) -> list[str]:
    """The names of the settings, sorted."""
    return sorted({lane.trial.setting for lane in lanes})


def _train_by_halves(
    sweep: LoadedSweep,
    lanes: Sequence[Lane],
    base: SharedBase,
    console: Console,
    resume: bool,
    rungs: list[list[str]],
) -> None:
    """Train all lanes to a step, end those of the worse half of the settings, and so on, until one half is left. A lane
    that cannot be continued now ends this. `rungs`: the settings that comparisons before a resume ended.

    Raises: Stopped after a stop signal.
    """
    file, settings = Path(sweep.loaded.recipe.output.dir) / RUNGS_NAME, _settings(lanes)
    dropped = {name for names in rungs for name in names}
    for left in range(rung_count(len(settings)) - len(rungs), 0, -1):
        ends = {lane.trial.name: _rung_of(lane, left) for lane in lanes}
        if not rungs and all(end is None for end in ends.values()):
            what = "halving compares evaluations from before the end, and there is none"
            raise RecipeError(what, "lower training.eval_steps", key="sweep.strategy")
        _train_lanes(lanes, base, console, resume, ends)
        if _unfinished(lanes):
            return
        compared = [lane for lane in lanes if lane.trial.setting not in dropped]
        results = sweep_results(sweep.section.by, _runs(compared), finished=False)
        rungs.append(dropped_settings(results))
        dropped.update(rungs[-1])
        _drop([lane for lane in compared if lane.trial.setting in dropped])
        write_json(file, {"settings": settings, "rungs": rungs})
        console.info(f"halving ends {', '.join(rungs[-1]) or 'no trial: none is clearly worse'}")


def _rung_of(lane: Lane, left: int) -> int | None:
    """The step of a lane's next comparison; None for the end of its run."""
    if lane.plan is None or lane.prepared is None:
        return None
    every = lane.trial.loaded.recipe.training.eval_steps
    sampling = lane.prepared.rows.objective.loss.updates_per_sampling
    step = rung_step(lane.steps, left, math.lcm(every, sampling))
    return step if step < lane.steps else None


def _drop(lanes: Sequence[Lane]) -> None:
    """End lanes that have paused."""
    for lane in lanes:
        if not lane.ended:
            step = max(step for step, _ in list_checkpoints(lane.path / "checkpoints"))
            write_json(lane.path / "status.json", {"exit_code": 143, "reason": f"ended by halving after step {step}"})
            lane.ended = True


def _runs(lanes: Sequence[Lane]) -> dict[str, list[RunValues]]:
    """The values of the runs of each setting."""
    runs: dict[str, list[RunValues]] = {}
    for lane in lanes:
        with damage_named(lane.path):
            runs.setdefault(lane.trial.setting, []).append(run_values(lane.path))
    return runs


def _compare(sweep: LoadedSweep, folder: Path, lanes: Sequence[Lane]) -> SweepResults:
    """Write sweep.json and the page."""
    results = sweep_results(sweep.section.by, _runs(lanes))
    values = {trial.name: trial.values for trial in sweep.trials}
    write_json(folder / SWEEP_NAME, {**results.values(), "trials": values})
    page = results.page()
    if page is not None:
        write_text(folder / PAGE_NAME, html_page(page))
    return results


def _unfinished(lanes: Sequence[Lane]) -> list[TunekitError]:
    """The errors of lanes that can be resumed."""
    errors = [lane.error for lane in lanes if lane.error is not None]
    return [error for error in errors if not isinstance(error, NumericsError)]


def _raise_errors(lanes: Sequence[Lane]) -> None:
    """Raises: the error of the lanes that can be resumed; NumericsError if the numbers of all lanes became invalid."""
    errors, unfinished = [lane.error for lane in lanes if lane.error is not None], _unfinished(lanes)
    if unfinished:
        more = Problem(f"{len(unfinished)} of {len(lanes)} trials are not finished", "continue with --resume")
        raise type(unfinished[0]).of([*(each for error in unfinished for each in error.problems), more])
    if errors and len(errors) == len(lanes):
        raise errors[0]
