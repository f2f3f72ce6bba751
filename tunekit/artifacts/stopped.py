"""The state of a run that its plain name means: the result of a run that has ended, otherwise its best or its last
checkpoint."""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tunekit.artifacts.checkpoint import list_checkpoints, newest_complete
from tunekit.artifacts.manifest import STATE
from tunekit.artifacts.run import RESULT_FILES, is_finished, read_json
from tunekit.errors import RunFolderError
from tunekit.files.lock import is_held
from tunekit.files.untrusted import printable
from tunekit.recipe.bases.paths import relative_to

MOST_REASON = 200  # characters
SIGNALLED = 128  # exit codes above it are those of signals
ENDED = re.compile(r"stopped by \w+|ended by halving")  # the part of a reason that a note repeats
RESULT_NAMES = {"adapter": "adapter_config.json", "model": "config.json"}  # result folder -> a file that it contains


@dataclass(frozen=True)
class NamedState:
    """The state that a run's name means. `folder`: of the result, or of a checkpoint. `note`: the step of an unfinished
    run and why it stopped; empty for a finished run."""

    folder: Path
    is_checkpoint: bool
    note: str


def resume_command(run: Path) -> str:
    """The command that continues a run."""
    return f"tunekit train {shlex.quote(relative_to(run / 'recipe.yaml'))} --resume"


def next_commands(run: Path, *, alone: bool = True) -> str:
    """The commands that use and continue a run that has stopped. `alone`: one process trained it."""
    resume = resume_command(run) if alone else "the same command with --resume"
    return f"use it: tunekit eval {shlex.quote(relative_to(run))}; continue it: {resume}"


def find_result(run: Path) -> Path | None:
    """The folder of the run's result, if it is up to date: a run that was resumed and stopped again has a newer
    checkpoint."""
    results = [run / name for name in RESULT_FILES if (run / name / RESULT_NAMES[name]).exists()]
    ended = _status(run).get("exit_code", 0) == 0 or not list_checkpoints(run / "checkpoints")
    return results[0] if results and ended else None


def named_state(run: Path, name: str) -> NamedState:
    """The state that the run's name means, decided from its files. `name`: as the user wrote it.

    Raises: RunFolderError if a process trains the run, or if there is neither a result nor a checkpoint.
    """
    refuse_running(run, f"use its last checkpoint, {name}@last, or wait until the run has ended")
    reason = _reason(_status(run))
    if (result := find_result(run)) is not None:
        report = read_json(run / "report.json") or {}
        step = report.get("best_step", report.get("final_step"))
        return NamedState(result, False, "" if is_finished(run) or step is None else _note(run, name, step, reason))
    newest = newest_complete(run / "checkpoints")
    if newest is None:
        how = f"continue it: {resume_command(run)}; training.save_steps sets the steps between checkpoints"
        raise RunFolderError(f"{name} has no result and no complete checkpoint ({reason})", how)
    steps = {folder: step for step, folder in list_checkpoints(run / "checkpoints")}
    best = _best_step(run, newest)
    chosen = next((folder for folder, step in steps.items() if step == best), newest)
    note = _note(run, name, steps[chosen], reason)
    if best is not None and steps[chosen] != best:
        note += f"; its best checkpoint, step {best}, was deleted"
    return NamedState(chosen, True, note)


def refuse_running(run: Path, how: str) -> None:
    """Raises: RunFolderError, with the advice `how`, if a process trains the run."""
    if is_held(run) and not is_finished(run):
        raise RunFolderError(f"a process is training {relative_to(run)}", how)


def _best_step(run: Path, newest: Path) -> int | None:
    """The best step up to the newest checkpoint; None if the recipe does not choose one."""
    plan = read_json(run / "plan.json") or {}
    chooses = plan.get("recipe", {}).get("evaluation", {}).get("best") is not None
    loop = json.loads((newest / STATE).read_bytes())["facts"].get("loop", {})
    return loop.get("best_step") if chooses else None


def _note(run: Path, name: str, step: int, reason: str) -> str:
    steps = (read_json(run / "plan.json") or {}).get("steps")
    return f"{name}: step {step}{f' of {steps}' if steps else ''}, {reason}"


def _status(run: Path) -> dict[str, object]:
    status = read_json(run / "status.json")
    return status if isinstance(status, dict) else {}


def _reason(status: dict[str, object]) -> str:
    """Why an unfinished run ended, in a few words."""
    code, reason = status.get("exit_code"), printable(str(status.get("reason", "")), MOST_REASON)
    if not isinstance(code, int):
        return "killed"
    if code == 0:
        return "whose result was deleted" if status.get("finished") else "stopped by training.max_minutes"
    ended = ENDED.match(reason)
    return ended[0] if ended else f"ended with exit code {code}: {reason}"
