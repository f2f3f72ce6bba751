"""The folder of a sweep: what is checked before its first trial, and the files with its results."""

from collections.abc import Sequence
from pathlib import Path

from tunekit.artifacts.checkpoint import list_checkpoints
from tunekit.artifacts.report.html import html_page
from tunekit.artifacts.report.sweep_page import sweep_page
from tunekit.artifacts.report.sweep_results import SweepResults
from tunekit.artifacts.run import RUN_SIGNS, SWEEP_NAME, read_json, refuse_old_run
from tunekit.errors import ResourceError, RunFolderError, listed
from tunekit.files.durable import free_bytes, make_folder, write_json, write_text
from tunekit.files.lock import FolderLock
from tunekit.recipe.bases.paths import relative_to
from tunekit.recipe.load import dump_recipe
from tunekit.recipe.reading.trial_recipes import FOLDS, LoadedSweep
from tunekit.records import bytes_text
from tunekit.training.automatic import AUTO_NAME
from tunekit.training.run_files import folder_bytes
from tunekit.training.rungs import RUNGS_NAME
from tunekit.training.trials import Trial

PAGE_NAME, BEST_NAME = "sweep.html", "best.yaml"
MOST_NAMED = 4  # trials that a message names
JOINED = "the rows of this run are joined with other trials"  # in the notes of a plan by an older version
WRITTEN = (SWEEP_NAME, PAGE_NAME, BEST_NAME, RUNGS_NAME, AUTO_NAME)


def open_sweep(folder: Path, trials: Sequence[Trial], resume: bool) -> FolderLock:
    """Lock the sweep's folder; returns the lock. Raises: RunFolderError if this folder or a trial's folder cannot be
    used."""
    if signs := [sign for sign in RUN_SIGNS if (folder / sign).exists()]:  # a sweep cannot continue or move a run
        how = f"choose another output.dir, such as output.dir={relative_to(folder)}-sweep"
        raise RunFolderError(f"{folder} already holds a run ({signs[0]})", how)
    refuse_old_run(folder)
    if not resume and (any((folder / name).exists() for name in WRITTEN) or _has_used_folds(folder)):
        raise RunFolderError(f"{folder} already holds a sweep", "add --resume, or choose another output.dir")
    earlier = read_json(folder / SWEEP_NAME) or {}
    others = sorted(set(earlier.get("trials", {})) - {trial.recipe.name for trial in trials})
    if others:
        what = f"{folder} holds a sweep with other trials ({listed(others, MOST_NAMED)})"
        raise RunFolderError(what, "write all values of that sweep too, or choose another output.dir")
    for trial in trials:
        if not resume and any((trial.path / sign).exists() for sign in RUN_SIGNS):
            raise RunFolderError(f"{trial.path} already holds a run", "add --resume, or choose another output.dir")
        refuse_old_run(trial.path, resume=resume)
    for path in (*reversed(folder.absolute().parents), folder):
        if not path.exists():
            make_folder(path)
    return FolderLock(folder)


def refuse_joined(trial: Trial) -> None:
    """Raises: RunFolderError if an older version trained this trial with joined rows up to a checkpoint. Separate steps
    round differently, so the end of the run would not belong to its beginning."""
    plan, folder = read_json(trial.path / "plan.json"), trial.path.parent
    notes = plan.get("notes") if isinstance(plan, dict) else None
    if JOINED in str(notes) and list_checkpoints(trial.path / "checkpoints"):
        what = f"{folder} holds trials that an older version began with joined rows (sweep.joined, which was removed)"
        what += ", and separate steps cannot continue them with the same bytes"
        how = f"choose another output.dir, such as output.dir={relative_to(folder)}-separate"
        raise RunFolderError(what, how)


def _has_used_folds(folder: Path) -> bool:
    """Whether a sweep in this folder has divided its rows and started a run. Folds alone are of a sweep that was
    refused before its first run, so they may be written anew."""
    runs = (path for path in folder.glob("*/") if any((path / sign).exists() for sign in RUN_SIGNS))
    return (folder / FOLDS).exists() and (not (folder / FOLDS).is_dir() or any(runs))


def require_space(folder: Path, trials: Sequence[Trial]) -> None:
    """Refuse to start if the disk is too small for the files of all trials. Raises: ResourceError."""
    sizes = [
        folder_bytes(trial.session, trial.plan, trial.planned)
        for trial in trials
        if trial.plan and trial.planned is not None
    ]
    free, needed = free_bytes(folder), sum(sizes) + max(sizes, default=0)
    if free < needed:
        what = f"{folder} has {bytes_text(free)} free, but {len(sizes)} trials need {bytes_text(needed)}"
        how = "free disk space, choose another output.dir, or lower training.keep_checkpoints"
        raise ResourceError(f"{what} for their checkpoints and results", how)


def write_trials(sweep: LoadedSweep) -> None:
    """Write the trials into sweep.json before the first step: a resume after a stop must know them. Earlier results
    stay."""
    file = Path(sweep.loaded.recipe.output.dir) / SWEEP_NAME
    write_json(file, {**(read_json(file) or {}), "trials": {trial.name: trial.values for trial in sweep.trials}})


def write_results(sweep: LoadedSweep, results: SweepResults) -> None:
    """Write sweep.json. If a trial is finished, also write the page, and the recipe of the best setting."""
    folder = Path(sweep.loaded.recipe.output.dir)
    values = {trial.name: trial.values for trial in sweep.trials}
    write_json(folder / SWEEP_NAME, {**results.values(), "trials": values})
    if results.best is not None:
        best = sweep.settings[results.best.name].loaded.recipe
        recipe = results.incomplete + dump_recipe(best, folder.absolute())
        write_text(folder / BEST_NAME, recipe)
        chosen = {name: setting.values for name, setting in sweep.settings.items()}
        page = sweep_page(results, chosen, (relative_to(folder / BEST_NAME), recipe))
        write_text(folder / PAGE_NAME, html_page(page))
