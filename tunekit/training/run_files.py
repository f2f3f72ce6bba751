"""What a run leaves in its folder beside checkpoints: how it ended, what is run, trackers; and the space it needs.

Comes in: the session, the plan.  Goes out: status.json, recipe.yaml, environment.json, plan.json, tracking/.
Next: train.py.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from tunekit.artifacts.run import RunFolder
from tunekit.artifacts.trackers import Trackers
from tunekit.errors import TunekitError
from tunekit.machine.environment import read_environment
from tunekit.recipe.load import dump_recipe
from tunekit.records import Plan
from tunekit.training.session import Session

OPTIMIZER_COPIES = 3  # weights and two moments: what a checkpoint holds of each trained number, in float32


def leave_status(folder: RunFolder | None, exit_code: int, reason: str) -> None:
    """Best effort: on a full disk the error itself matters more."""
    if folder is not None:
        try:
            folder.status(exit_code, reason)
        except TunekitError as error:
            folder.warn(f"status.json could not be written: {error}")


def written_bytes(plan: Plan, keep: int) -> int:
    """Checkpoints (one more than are kept, while saving) and the adapter."""
    return plan.trainable_parameters * 4 * (OPTIMIZER_COPIES * (keep + 1) + 1)


def begin_folder(session: Session, plan: Plan, step: int, fingerprint: dict[str, Any]) -> None:
    """Leave in the run folder what is run; on a resume, forget what was logged after the checkpoint."""

    def write() -> None:
        folder = session.folder
        if folder is None:
            return
        folder.write_text("recipe.yaml", dump_recipe(session.loaded.recipe, relative_to=folder.path))
        environment = read_environment(device=str(session.devices.device), more={"fingerprint": fingerprint})
        folder.write_json("environment.json", environment)
        folder.truncate_metrics(step)
        folder.write_json("plan.json", asdict(plan))

    session.devices.on_main(write)


def make_trackers(session: Session, step: int) -> Trackers | None:
    recipe = session.loaded.recipe
    if session.folder is None or not recipe.output.report_to:
        return None
    return Trackers(recipe.output.report_to, session.folder.path / "tracking", step)
