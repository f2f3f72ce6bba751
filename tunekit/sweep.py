"""`tunekit sweep`: trains the trials of a recipe over one loaded base, and compares their results.

The trials are fixed before the first one starts (recipe/reading/trial_recipes.py; with --auto, training/automatic.py
chooses their values). Only halving decides during the sweep: `_train_by_halves` ends the settings that
`dropped_settings` (training/halving.py) names at each comparison. A trial is a run like any other, in its own folder.
Its result has the same bytes as the result of `tunekit train`.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch

from tunekit.artifacts.report.sweep_results import SweepResults, sweep_results
from tunekit.artifacts.run import SWEEP_NAME, read_json
from tunekit.console import Console
from tunekit.console.progress import CountProgress
from tunekit.console.text import time_text
from tunekit.data.reading.replaced import refuse_to_replace
from tunekit.errors import InputError, NumericsError, Problem, RecipeError, Stopped, TunekitError, listed
from tunekit.files.durable import json_result, write_json
from tunekit.machine.cpu_times import process_seconds
from tunekit.machine.devices import deterministic_kernels, make_devices
from tunekit.machine.memory import reset_host_peak
from tunekit.machine.signals import StopSignals
from tunekit.planning.announce import announce
from tunekit.planning.ranks import plan_session
from tunekit.planning.trial_groups import group_trials
from tunekit.recipe.bases.paths import relative_to
from tunekit.recipe.load import LoadedRecipe
from tunekit.recipe.reading.trial_recipes import LoadedSweep, load_sweep, refuse_values
from tunekit.records import Plan
from tunekit.training import run_files
from tunekit.training.automatic import AUTO_NAME, AutomaticChoice, choice_record, choose_values, earlier_choice
from tunekit.training.begin import load_base
from tunekit.training.folds import fold_notes, write_folds
from tunekit.training.halving import dropped_settings, rung_count
from tunekit.training.rungs import (
    RUNGS_NAME,
    Limits,
    crowded_rungs,
    earlier_rungs,
    end_paused,
    most_settings,
    rung_of,
    runs_by_setting,
    setting_names,
)
from tunekit.training.session import Session
from tunekit.training.sweep_folder import (
    BEST_NAME,
    PAGE_NAME,
    WRITTEN,
    open_sweep,
    refuse_joined,
    require_space,
    write_results,
    write_trials,
)
from tunekit.training.timing import STEPS as MEASURED_STEPS
from tunekit.training.timing import Costs, measure_costs
from tunekit.training.together import opened_trial, train_together
from tunekit.training.trials import SharedBase, Trial, refuse_changed_rows

MOST_NAMED = 4  # trials that a message names


def sweep_verb(sweep: LoadedSweep, resume: bool, json_file: str | None) -> None:
    """Train all trials that are not finished, and write their comparison below output.dir.

    Raises: TunekitError if a trial could not be trained to its end; a trial with invalid numbers is a result.
    """
    recipes = [sweep.loaded, *(setting.loaded for setting in sweep.settings.values())]
    with _process(recipes, json_file) as (session, write_result):
        session.console.info(*sweep.loaded.rewrites)
        _run_sweep(sweep, session, SharedBase(load_base), resume, write_result, None)


def automatic_verb(
    loaded: LoadedRecipe, path: str, overrides: Sequence[str], minutes: float, resume: bool, json_file: str | None
) -> None:
    """Choose rates, ranks and lengths of training by the time of measured steps, and sweep them by halving within
    `minutes`. `loaded`: the recipe, read from `path` with `overrides`.

    Raises: TunekitError, also if the time is too short for two runs.
    """
    seconds = 60 * minutes
    limits = Limits(time.monotonic() - process_seconds() + seconds)
    refuse_values(loaded.sweep, path)
    if not loaded.recipe.data.eval:
        file_name = str(loaded.path)
        raise RecipeError("trials are compared on evaluation rows", "set data.eval", file=file_name, key="data.eval")
    with _process([loaded], json_file) as (session, write_result):
        automatic = earlier_choice(Path(loaded.recipe.output.dir)) if resume else None
        plan, limits.costs = _measure(session, resume)
        if automatic is None:
            automatic = _choose(session.console, loaded, plan, limits.costs, seconds).automatic
        sweep = load_sweep(path, overrides, automatic)
        base = SharedBase(load_base)
        _run_sweep(sweep, session, base, resume, write_result, limits, {AUTO_NAME: choice_record(automatic)})


def _measure(session: Session, resume: bool) -> tuple[Plan, Costs]:
    """The plan of the recipe, and its measured costs. Raises: InputError if its first steps are not finite."""
    with session.signals.at_once("before training began; nothing was trained"):
        plan, planned = plan_session(session, in_resumed_sweep=resume)
        costs = measure_costs(session, plan, planned, load_base)
    gc.collect()  # the measured base: the trials are planned with the memory that is free
    if costs is None:
        raise InputError(
            "the recipe's loss or gradient is not finite in the first steps", "lower training.learning_rate"
        )
    return plan, costs


def _choose(console: Console, loaded: LoadedRecipe, plan: Plan, costs: Costs, seconds: float) -> AutomaticChoice:
    """The values to try within `seconds`. Raises: InputError if not even two runs fit."""
    seeds = 1 if loaded.sweep is None else loaded.sweep.seeds
    choice = choose_values(loaded.recipe, plan, costs, seconds - process_seconds(), seeds)
    if choice is None:
        one = time_text(costs.of_run(plan, loaded.recipe))
        used = time_text(process_seconds())
        left = f"after {used} of preparation, --minutes {seconds / 60:g} leaves too little for two of a third of it"
        what = f"one run takes about {one}; {left}"
        raise InputError(what, "raise --minutes, or lower training.epochs")
    if choice.shortened:
        console.info(
            f"two whole runs do not fit into --minutes {seconds / 60:g}: all trials have a third of the recipe's "
            f"{choice.automatic.length}"
        )
    values = (f"{key} {', '.join(f'{value:g}' for value in some)}" for key, some in choice.automatic.keys.items())
    console.info(
        f"--auto tries {choice.trials} trials by halving: {'; '.join(values)}",
        f"predicted time: at most {time_text(choice.seconds)} of the {time_text(seconds)}, from {MEASURED_STEPS} "
        "measured steps of the recipe",
    )
    return choice


@contextmanager
def _process(
    recipes: Sequence[LoadedRecipe], json_file: str | None
) -> Iterator[tuple[Session, Callable[[object], None]]]:
    """A context manager: the session of the whole sweep, and the function that writes the --json result. `recipes`: the
    sweep's recipe, and the recipes of its settings. Raises: InputError if the sweep would write over
    a file that it reads."""
    loaded = recipes[0]
    for each in recipes:
        refuse_to_replace("--json", json_file, each)
        for name in WRITTEN:
            refuse_to_replace("output.dir: the sweep's file", str(Path(loaded.recipe.output.dir) / name), each)
    write_result, devices = json_result(json_file), make_devices()
    try:
        with StopSignals() as signals:
            yield Session(loaded, devices, Console(json_file=json_file), signals), write_result
    finally:
        devices.close()


def _run_sweep(
    sweep: LoadedSweep,
    session: Session,
    base: SharedBase,
    resume: bool,
    write_result: Callable[[object], None],
    limits: Limits | None,
    files: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Train and compare the trials. `files`: further JSON files to write into the folder. Raises: the errors of
    trials."""
    start = process_seconds()  # before the trials are planned
    console, folder, halves = session.console, Path(sweep.loaded.recipe.output.dir), sweep.section.strategy == "halving"
    sessions = [replace(session, loaded=trial.loaded, seconds={}) for trial in sweep.trials]
    trials = [Trial(*pair) for pair in zip(sweep.trials, sessions, strict=True)]
    lock = open_sweep(folder, trials, resume)
    try:
        rungs = earlier_rungs(folder, trials) if halves and resume else []
        with session.signals.at_once("before training began; nothing was trained"):
            if sweep.section.folds is not None:
                write_folds(sweep.loaded.recipe, sweep.section, folder, resume)
                console.info(*fold_notes(sweep.loaded.recipe, sweep.section))
            _plan_trials(trials, console, resume)
            if not resume:
                require_space(folder, trials)
            announce(trials, base, console, len(setting_names(trials)) if halves and not rungs else 0, limits, start)
        write_trials(sweep)
        for name, value in files.items():
            write_json(folder / name, value)
        if halves:
            _train_by_halves(sweep, trials, base, console, resume, rungs, limits)
        if not _unfinished(trials):
            _train_trials(trials, base, console, resume)
        results = _compare(sweep, trials)
        console.table(*results.table())
        console.result(results.verdict(), *results.contributions())
        try:
            write_results(sweep, results)
        except TunekitError as error:  # the disk is full; the errors of trials are more important
            _raise_errors(trials, error.problems)
            raise
    except Stopped:
        results = _compare(sweep, trials)
        if results.best is not None:
            console.table(*results.table())
        raise
    finally:
        lock.release()
    if results.best is not None:
        console.info(f"page: {folder / PAGE_NAME}")
        console.result(f"the recipe with the best values: {relative_to(folder / BEST_NAME)}")
    write_result(read_json(folder / SWEEP_NAME))
    _raise_errors(trials)


def _plan_trials(trials: Sequence[Trial], console: Console, resume: bool) -> None:
    """Plan all trials before the first one is trained, and print what will happen.

    Raises: TunekitError with the problems of all trials.
    """
    faults, kind = dict[Problem, list[Trial]](), None
    threads = torch.get_num_threads()
    console.info(f"planning {len(trials)} trials ...")
    progress = CountProgress(console)
    for number, trial in enumerate(trials):
        progress("trials planned", number, len(trials))
        torch.set_num_threads(threads)
        try:
            trial.ended = trial.ended or (resume and _has_ended(trial, console))
            if trial.ended:
                continue
            if resume:
                refuse_joined(trial)
            previous = run_files.execution_in(trial.path) if resume else None
            trial.plan, trial.planned = plan_session(trial.session, previous, in_resumed_sweep=resume)
        except TunekitError as error:
            kind = kind or type(error)
            for problem in error.problems:
                faults.setdefault(problem, []).append(trial)
    if kind is not None:
        raise kind.of([_named(problem, names, trials) for problem, names in faults.items()])
    refuse_changed_rows(trials)


def _named(problem: Problem, trials: Sequence[Trial], all_trials: Sequence[Trial]) -> Problem:
    """The problem, with the names of the trials that have it. A problem of all trials, such as an error in a data file,
    is returned without names."""
    if len(trials) == len(all_trials):
        return problem
    return replace(problem, what=f"{problem.what} ({listed([trial.recipe.name for trial in trials], MOST_NAMED)})")


def _has_ended(trial: Trial, console: Console) -> bool:
    """Whether the run is finished, or ended with invalid numbers. A resume would only repeat the invalid numbers.

    Raises: RunFolderError if the run has a different recipe.
    """
    status = read_json(trial.path / "status.json")
    if not isinstance(status, dict) or status.get("exit_code") != NumericsError.exit_code:
        return run_files.is_run_finished(trial.session)
    run_files.refuse_changed_recipe(trial.session)
    how = "to train it again with other values, choose another output.dir"
    trial.error = NumericsError(str(status.get("reason", "its numbers are not finite")), how)
    console.warn(f"{trial.recipe.name}: {trial.error}")
    return True


def _train_trials(
    trials: Sequence[Trial],
    base: SharedBase,
    console: Console,
    resume: bool,
    ends: Mapping[str, int | None] | None = None,
) -> None:
    """Train the trials, one group of trials after another. If a trial fails, the others continue. `ends`: the
    step after which each trial pauses, with a checkpoint.

    Raises: Stopped after a stop signal.
    """
    seconds, steps = 0.0, 0
    groups = [group for each in group_trials(trials) for group in each.groups()]
    for number, group in enumerate(groups):
        base.use_for(group[0])
        left = sum(trial.steps for each in groups[number:] for trial in each)
        time_left = f", about {time_text(seconds / steps * left)} left" if steps and ends is None else ""
        names = ", ".join(trial.recipe.name for trial in group)
        numbers = ", ".join(str(trials.index(trial) + 1) for trial in group)
        console.info("", f"trial {numbers} of {len(trials)}: {names}{time_left}")
        started = time.monotonic()
        with deterministic_kernels(group[0].recipe.loaded.recipe.training.deterministic):
            ends_of = [None if ends is None else ends[trial.recipe.name] for trial in group]
            openings = (opened_trial(*pair, base, resume, len(group) > 1) for pair in zip(group, ends_of, strict=True))
            train_together(openings, console.warn)
        seconds, steps = seconds + time.monotonic() - started, steps + sum(trial.steps for trial in group)
        gc.collect()
        reset_host_peak()


def _train_by_halves(
    sweep: LoadedSweep,
    trials: Sequence[Trial],
    base: SharedBase,
    console: Console,
    resume: bool,
    rungs: list[list[str]],
    limits: Limits | None,
) -> None:
    """Train all trials to a common comparison, end settings of the worse half, and repeat this for each comparison.
    Returns early if a trial failed and must be resumed. `rungs`: the settings that earlier comparisons ended.

    Raises: Stopped after a stop signal.
    """
    file, settings = Path(sweep.loaded.recipe.output.dir) / RUNGS_NAME, setting_names(trials)
    dropped = {name for names in rungs for name in names}
    first_left = rung_count(len(settings)) - len(rungs)
    for left in range(first_left, 0, -1):
        ends = {trial.recipe.name: rung_of(trial, left) for trial in trials}
        if not rungs and all(end is None for end in ends.values()):
            what = "halving compares evaluations before the last step, and the trials have none"
            raise RecipeError(what, "lower training.eval_steps", key="sweep.strategy")
        if not rungs:
            console.warn(*crowded_rungs(trials))
        started, compared = time.monotonic(), [trial for trial in trials if trial.recipe.setting not in dropped]
        _train_trials(trials, base, console, resume, ends)
        if _unfinished(trials):
            return
        if limits is not None and (left < first_left or not resume):  # else a part of it was trained earlier
            limits.set_pace(time.monotonic() - started, compared, left, first=not rungs)
        runs = runs_by_setting(compared)
        results = sweep_results(sweep.section.by, runs, finished=False, folds=sweep.section.folds)
        rungs.append(dropped_settings(results, most_settings(limits, results, compared, left)))
        dropped.update(rungs[-1])
        end_paused([trial for trial in compared if trial.recipe.setting in dropped])
        write_json(file, {"settings": settings, "rungs": rungs, "verdict": results.verdict()})
        console.info(f"halving ends {', '.join(rungs[-1]) or 'no trial: none is clearly worse'}")


def _compare(sweep: LoadedSweep, trials: Sequence[Trial]) -> SweepResults:
    """Compare the trials."""
    results = sweep_results(sweep.section.by, runs_by_setting(trials), folds=sweep.section.folds)
    if sweep.section.strategy == "halving":
        folder = Path(sweep.loaded.recipe.output.dir)
        return replace(results, earlier=(read_json(folder / RUNGS_NAME) or {}).get("verdict", ""))
    return results


def _unfinished(trials: Sequence[Trial]) -> list[TunekitError]:
    """The errors of the trials that can be resumed."""
    errors = [trial.error for trial in trials if trial.error is not None]
    return [error for error in errors if not isinstance(error, NumericsError)]


def _raise_errors(trials: Sequence[Trial], others: Sequence[Problem] = ()) -> None:
    """Raises: an error if trials can be resumed, with the `others`; NumericsError if all trials ended with
    invalid numbers. Each trial's own error has already been printed as a warning."""
    errors, unfinished = [trial.error for trial in trials if trial.error is not None], _unfinished(trials)
    if unfinished:
        more = Problem(f"{len(unfinished)} of {len(trials)} trials are not finished", "continue with --resume")
        raise type(unfinished[0]).of([*others, more])
    if errors and len(errors) == len(trials):
        what = "every trial ended with invalid numbers; the warnings above name each reason"
        raise NumericsError(what, "lower training.learning_rate")
