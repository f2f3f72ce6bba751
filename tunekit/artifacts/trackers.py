"""Experiment trackers, through accelerate's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunekit.errors import RecipeError


class Trackers:
    """Trackers beside metrics.jsonl, through accelerate. Made on the main rank only."""

    def __init__(self, names: tuple[str, ...], folder: Path, first_step: int) -> None:
        self.trackers = [_make_tracker(name, folder, first_step) for name in names]

    def log(self, values: dict[str, float], step: int) -> None:
        """Hand numbers to every tracker."""
        for tracker in self.trackers:
            tracker.log(values, step=step)

    def close(self) -> None:
        """Flush and close."""
        for tracker in self.trackers:
            tracker.finish()


def _make_tracker(name: str, folder: Path, first_step: int) -> Any:
    from accelerate import tracking

    if name == "tensorboard" and tracking.is_tensorboard_available():
        tracker = tracking.TensorBoardTracker(run_name="tensorboard", logging_dir=str(folder), purge_step=first_step)
        tracker.start()
        return tracker
    raise RecipeError(
        f"output.report_to names {name}, which is not installed", f"run: pip install {name}", key="output.report_to"
    )
