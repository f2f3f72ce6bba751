"""A run folder goes in; what its files say comes out as plain values, for pages and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tunekit.artifacts.metrics_log import METRICS_NAME, read_metrics
from tunekit.artifacts.run import ROWS_NAME, RUN_SIGNS, read_json
from tunekit.errors import InputError
from tunekit.files.lock import is_held
from tunekit.recipe.reading.names import known_names, sizes_of


@dataclass(frozen=True)
class RunValues:
    """What the files of one run folder hold; an absent file is empty."""

    path: Path
    recipe_text: str
    plan: dict[str, Any]
    report: dict[str, Any]  # empty until the run is finished
    environment: dict[str, Any]
    status: dict[str, Any]
    steps: list[dict[str, Any]]  # one record an optimizer step
    evaluations: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe with its defaults, as plan.json holds it."""
        return dict(self.plan.get("recipe", {}))

    @property
    def exported_step(self) -> int | None:
        """Of the evaluation of the exported weights; the last one where the run goes on."""
        return self.report.get("best_step") or max((record["step"] for record in self.evaluations), default=None)

    @cached_property
    def row_losses(self) -> dict[str, Any]:
        """The losses of the evaluation rows as RowLosses keeps them; empty where those of the exported weights are not
        there."""
        found = read_json(self.path / ROWS_NAME)
        return found if isinstance(found, dict) and found.get("step") == self.exported_step else {}

    @property
    def state(self) -> str:
        """Whether it is finished, goes on, or why it ended."""
        if self.report and self.status.get("exit_code") is None:
            return "finished"
        return str(self.status.get("reason", "not begun"))


def read_run(path: Path) -> RunValues:
    """Raises: InputError where the folder holds no run."""
    if not any((path / sign).exists() for sign in RUN_SIGNS):
        raise InputError(f"{path} holds no run (no plan.json)", "name a run's folder, output.dir of its recipe")
    return run_values(path)


def run_values(path: Path) -> RunValues:
    """The values of a folder, of which any file may be absent."""
    found = {name: read_json(path / f"{name}.json") for name in ("plan", "report", "environment", "status")}
    files = {name: value if isinstance(value, dict) else {} for name, value in found.items()}
    recipe = path / "recipe.yaml"
    records = read_metrics(path / METRICS_NAME)
    return RunValues(
        path=path,
        recipe_text=recipe.read_text("utf-8", "replace") if recipe.is_file() else "",
        steps=[record for record in records if "eval" not in record],
        evaluations=[record for record in records if "eval" in record],
        **files,
    )


def sizes_counted(runs: Sequence[RunValues]) -> str:
    """What the speeds of the runs count: tokens, pixels; tokens where a run does not say."""
    named = (run.recipe.get("objective") for run in runs)
    methods = (each.get("method", "sft") if isinstance(each, dict) else "sft" for each in named)
    return " / ".join(
        dict.fromkeys(sizes_of(name) if name in known_names("objectives") else "tokens" for name in methods)
    )


def state_of(values: RunValues) -> str:
    """Running, or why it ended; a run that was killed could not say so itself."""
    if values.status.get("exit_code") is not None:
        return values.state
    return "running" if is_held(values.path) else "killed; go on with --resume"
