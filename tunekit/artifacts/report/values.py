"""The values of a run folder's files, for pages and comparisons. Any file, and any key, may be absent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypedDict, cast

from tunekit.artifacts.metrics_log import METRICS_NAME, read_metrics
from tunekit.artifacts.run import ROWS_NAME, RUN_SIGNS, read_json
from tunekit.errors import InputError
from tunekit.files.lock import is_held
from tunekit.recipe.reading.names import known_names, shows_of
from tunekit.records import DEFAULT_SHOWS, Shows


class CountValues(TypedDict, total=False):
    """What a page reads of RowCounts."""

    dropped_reasons: dict[str, int]


class PlannedRowValues(TypedDict, total=False):
    """What a page reads of PlannedRows."""

    training: CountValues
    evaluation: CountValues | None
    packing: bool
    packing_reason: str
    steps_per_epoch: int | None


class PlanValues(TypedDict, total=False):
    """What a page reads of plan.json."""

    recipe: dict[str, object]
    model: dict[str, object]
    text: object
    device: str
    targets: list[object]
    trainable_parameters: int
    total_parameters: int
    steps: int
    rows: PlannedRowValues
    peak_bytes: dict[str, int]
    notes: list[str]
    budget_bytes: int | None


class ClassValues(TypedDict, total=False):
    """Each label of the evaluation."""

    labels: list[str]
    per_class: list[dict[str, float]]


class ReactionValues(TypedDict):
    """A Reaction."""

    probe: str
    action: str
    step: int


class ReportValues(TypedDict, total=False):
    """What a page reads of report.json."""

    verdict: str
    base_eval_loss: float
    eval_loss: float
    final_loss: float
    best_step: int
    final_step: int
    tokens: int
    supervised_tokens: int
    tokens_per_second: float
    supervised_tokens_per_second: float
    seconds: dict[str, float]
    predicted_bytes: dict[str, int]
    measured_bytes: dict[str, int]
    peak_requested_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_host_bytes: int
    adapter_bytes: int
    base_bytes: int
    classes: ClassValues
    reactions: list[ReactionValues]
    skipped_steps: int
    calibration: dict[str, object]


class StepValues(TypedDict, total=False):
    """What every step of metrics.jsonl has, next to what its objective logs."""

    step: int
    loss: float


class EvaluationValues(TypedDict, total=False):
    """An evaluation of metrics.jsonl."""

    step: int
    eval: dict[str, float]
    samples: list[dict[str, str]]
    sources: dict[str, dict[str, float]]


class WorstRowValues(TypedDict):
    """A row of high loss: stretches of its text, and whether each is trained on."""

    number: int
    text: list[tuple[str, bool]]


class RowLossValues(TypedDict, total=False):
    """The loss of each evaluation row, as RowLosses keeps it."""

    step: int
    rows: list[str]
    units: list[int]
    digests: list[str]
    losses: list[float | None]
    before: list[float | None] | None
    worst: list[WorstRowValues]


@dataclass(frozen=True)
class RunValues:
    """What the files of one run folder hold; an absent file is empty."""

    path: Path
    recipe_text: str
    plan: PlanValues
    report: ReportValues  # empty until the run is finished
    environment: Mapping[str, object]
    status: Mapping[str, object]
    steps: Sequence[StepValues]
    evaluations: Sequence[EvaluationValues]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @property
    def recipe(self) -> Mapping[str, object]:
        """The recipe with its defaults, as plan.json holds it."""
        return self.plan.get("recipe", {})

    def section(self, name: str) -> Mapping[str, object]:
        """A section of the recipe; empty if it is absent."""
        section = self.recipe.get(name)
        return section if isinstance(section, dict) else {}

    @cached_property
    def shows(self) -> Shows:
        """What is shown of the run's objective."""
        name = self.section("objective").get("method")
        return shows_of(str(name)) if name in known_names("objectives") else DEFAULT_SHOWS

    @property
    def exported_step(self) -> int | None:
        """Of the evaluation of the exported weights; the last one where the run goes on."""
        return self.report.get("best_step") or max((record["step"] for record in self.evaluations), default=None)

    @cached_property
    def row_losses(self) -> RowLossValues:
        """The losses of the evaluation rows; empty if those of the exported weights are not there."""
        values = read_json(self.path / ROWS_NAME)
        of_exported = isinstance(values, dict) and values.get("step") == self.exported_step
        return cast(RowLossValues, values if of_exported else {})

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
    read = (read_json(path / f"{name}.json") for name in ("plan", "report", "environment", "status"))
    plan, report, environment, status = (value if isinstance(value, dict) else {} for value in read)
    recipe = path / "recipe.yaml"
    records = read_metrics(path / METRICS_NAME)
    return RunValues(
        path=path,
        recipe_text=recipe.read_text("utf-8", "replace") if recipe.is_file() else "",
        plan=cast(PlanValues, plan),
        report=cast(ReportValues, report),
        environment=environment,
        status=status,
        steps=cast(list[StepValues], [record for record in records if "eval" not in record]),
        evaluations=cast(list[EvaluationValues], [record for record in records if "eval" in record]),
    )


def sizes_counted(runs: Sequence[RunValues]) -> str:
    """What the speeds of the runs count: tokens, pixels."""
    return " / ".join(dict.fromkeys(run.shows.sizes for run in runs))


def state_of(values: RunValues) -> str:
    """Running, or why it ended; a run that was killed could not say so itself."""
    if values.status.get("exit_code") is not None:
        return values.state
    return "running" if is_held(values.path) else "killed; go on with --resume"
