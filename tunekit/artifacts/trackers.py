"""Experiment trackers, used through accelerate in addition to metrics.jsonl. A tracker receives the run's name, tag and
numbers, and how the run ended.

If a tracker fails during the run, this is reported once, and the tracker is no longer used. A tracker never ends a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit.artifacts.run import read_json
from tunekit.errors import InputError, RecipeError, Stopped
from tunekit.files.durable import write_json

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "tunekit"  # the default if the tracker's environment variable is not set


@dataclass(frozen=True)
class TrackedRun:
    """The facts of a run that trackers receive."""

    name: str
    folder: Path  # for local files of trackers
    values: Mapping[str, object]  # dotted key of the recipe -> value
    first_step: int  # the last step that is already done: 0, or the step of the resume

    @property
    def recipe_hash(self) -> str:
        """A hash of the recipe's values, with sixteen hex digits. Runs with equal values have equal hashes."""
        text = json.dumps(self.values, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def tag(self) -> str:
        """The run's tag, for trackers that support tags."""
        return f"recipe-{self.recipe_hash}"


class Trackers:
    """The trackers of one run, on the main rank only. It is a context manager: when the block ends, the run ends in
    every tracker."""

    def __init__(self, names: tuple[str, ...], run: TrackedRun, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._ids_file = run.folder / "ids.json"  # tracker -> id of the run, for a resume
        ids = read_json(self._ids_file)
        self._ids: dict[str, str] = ids if isinstance(ids, dict) else {}
        self._trackers: dict[str, GeneralTracker] = {}
        for name in names:
            run.folder.mkdir(exist_ok=True)
            self._trackers[name] = self._start(name, run)

    def _start(self, name: str, run: TrackedRun) -> GeneralTracker:
        """Start one tracker. Raises: RecipeError if it is not installed, InputError if it cannot start."""
        from accelerate import tracking

        kinds = {str(getattr(kind, "value", kind)) for kind in tracking.get_available_trackers()}
        if name not in kinds:
            what, how = f"output.report_to names {name}, which is not installed", f"run: pip install {name}"
            raise RecipeError(what, how, key="output.report_to")
        try:
            with _beside_results():
                tracker = tracking.LOGGER_TYPE_TO_CLASS[name](**_options(name, run, self._ids.get(name)))
                tracker.start()
                identity = _describe(name, tracker, run)
        except Exception as error:
            self.close(error)
            what = f"{name} could not start: {' '.join(str(error).split())[:300] or type(error).__name__}"
            raise InputError(
                what, "see the tracker's documentation, or remove the tracker", key="output.report_to"
            ) from error
        if identity is not None and self._ids.get(name) != identity:
            self._ids[name] = identity
            write_json(self._ids_file, self._ids)
        return tracker

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers to every tracker. Non-finite numbers are left out."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for name, tracker in list(self._trackers.items()):
            with self._without_stopping(name):
                tracker.log(finite, step=step)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """Mark the run as ended in every tracker: as finished, or as failed with `error`."""
        for name, tracker in list(self._trackers.items()):
            with self._without_stopping(name):
                _finish(name, tracker, error)
        self._trackers.clear()

    @contextlib.contextmanager
    def _without_stopping(self, name: str) -> Iterator[None]:
        """A context manager: if the tracker fails inside the block, a warning is printed and the tracker is no longer
        used."""
        try:
            with _beside_results():
                yield
        except Exception as error:
            self._trackers.pop(name, None)
            what = " ".join(str(error).split())[:300] or type(error).__name__
            self._warn(f"output.report_to: {name} failed and is not used any more: {what}")


@contextlib.contextmanager
def _beside_results() -> Iterator[None]:
    """Redirect the output of trackers to standard error, because standard output may be JSON."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _options(name: str, run: TrackedRun, identity: str | None) -> dict[str, object]:
    """The arguments for accelerate's tracker class. `identity`: the id that the tracker gave to the run that is
    resumed."""
    folder, values = str(run.folder), dict(run.values)
    named = {"name": run.name, "config": values | {"recipe_hash": run.recipe_hash}}
    resumed = {"id": identity, "resume": "allow"} if identity else {}
    project = {"run_name": os.environ.get(f"{name.upper()}_PROJECT", PROJECT)}
    match name:
        case "tensorboard":  # hide events after the checkpoint, which will be written again
            return {"run_name": name, "logging_dir": folder, "purge_step": run.first_step + 1}
        case "wandb":
            from wandb import Settings

            quiet = Settings(console="off")  # otherwise it wraps the standard streams, to copy the progress line
            return {**project, **named, **resumed, "tags": [run.tag], "dir": folder, "settings": quiet}
        case "trackio":  # this tracker finds runs by their name
            return {**project, **named, "name": identity or run.name, "resume": "allow" if identity else "never"}
        case "mlflow":
            return {"experiment_name": PROJECT, "run_name": run.name, "run_id": identity}
        case "aim":
            return {"run_name": run.name, "logging_dir": folder, "run_hash": identity, "experiment": PROJECT}
        case "comet_ml":
            from comet_ml import ExperimentConfig

            kept_out = {"log_code": False, "log_git_patch": False, "auto_output_logging": False}
            options = ExperimentConfig(name=run.name, tags=[run.tag], **kept_out)
            project = {"run_name": os.environ.get("COMET_PROJECT_NAME", PROJECT)}
            return {**project, "experiment_key": identity, "experiment_config": options}
        case "clearml":
            options = {
                "project_name": PROJECT,
                "task_name": run.name,
                "tags": [run.tag],
                "auto_connect_frameworks": False,
            }
            return options | ({"continue_last_task": identity} if identity else {"reuse_last_task_id": False})
        case "dvclive":
            options = {"dir": f"{folder}/{name}", "dvcyaml": f"{folder}/{name}/dvc.yaml"}
            return {**options, "resume": run.first_step > 0, "save_dvc_exp": False}
        case _:  # swanlab
            options = {"experiment_name": run.name, "tags": [run.tag], "logdir": f"{folder}/{name}"}
            return {**project, **options, **resumed, "config": values | {"recipe_hash": run.recipe_hash}}


def _describe(name: str, tracker: GeneralTracker, run: TrackedRun) -> str | None:
    """Send tags and values that the tracker does not accept when it starts. Returns the id that the tracker gave to the
    run, which a resume needs; None if there is no id."""
    native, values = tracker.tracker, dict(run.values) | {"recipe_hash": run.recipe_hash}
    match name:
        case "tensorboard":
            native.add_text("recipe_hash", run.recipe_hash, run.first_step)
            native.add_text("recipe", "".join(f"    {key}: {value}\n" for key, value in values.items()), run.first_step)
            return None
        case "mlflow":
            import mlflow

            mlflow.set_tags({"recipe_hash": run.recipe_hash})
            tracker.store_init_configuration({key: str(value) for key, value in run.values.items()})
            return str(native.info.run_id)
        case "aim":
            native.add_tag(run.tag)
            tracker.store_init_configuration(values)
            return str(native.hash)
        case "comet_ml" | "clearml" | "dvclive":
            tracker.store_init_configuration(values)
            return str(native.get_key() if name == "comet_ml" else native.id) if name != "dvclive" else None
        case "trackio":
            return str(native.name)
        case _:  # wandb, swanlab
            return str(native.id)


def _finish(name: str, tracker: GeneralTracker, error: BaseException | None) -> None:
    """Mark the run as ended in one tracker. accelerate can only mark a run as finished, so failures are sent with the
    tracker's own API."""
    stopped = isinstance(error, Stopped | KeyboardInterrupt)
    if error is not None and name == "clearml":
        tracker.tracker.mark_stopped() if stopped else tracker.tracker.mark_failed(status_reason=str(error))
    if error is not None and name == "mlflow":
        import mlflow

        mlflow.end_run("KILLED" if stopped else "FAILED")
    elif error is not None and name == "wandb":
        tracker.tracker.finish(exit_code=getattr(error, "exit_code", 1))
    elif error is not None and name == "swanlab":
        tracker.tracker.finish("crashed", error=str(error))
    else:
        tracker.finish()
