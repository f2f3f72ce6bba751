"""Reads the files of a run folder, for pages and comparisons. Any file and any key may be absent."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tunekit.artifacts.metrics_log import METRICS_NAME, read_metrics
from tunekit.artifacts.run import EXPORTS, ROWS_NAME, RUN_SIGNS, STOPPED_BY_TIME, TASKS_NAME, read_json
from tunekit.errors import InputError, RunFolderError, TunekitError
from tunekit.files.lock import is_held
from tunekit.files.untrusted import printable
from tunekit.recipe.bases.section import ObjectiveSettings
from tunekit.recipe.reading.names import facts_of, known_names, objective_class
from tunekit.records import Headline, Shows

FILES = ("plan", "report", "environment", "status")
LARGEST = 1e300  # the largest valid number; larger numbers and NaN are damage
MOST_CHARACTERS = 2**20  # maximum of a shown text file; a recipe is not larger
LEARNED = 0.01  # a loss in nats per unit below which nothing is left to learn: the probability is above 0.99
MOST_NAME = 200  # maximum characters of a state's text


class Values(dict[str, object]):
    """A JSON object from a file. A value of an unexpected type counts as absent."""

    def number(self, name: str) -> float | None:
        """A finite number, or None."""
        value = self.get(name)
        return value if isinstance(value, int | float) and abs(value) <= LARGEST else None

    def count(self, name: str) -> int:
        """A whole number, or 0."""
        value = self.number(name)
        return value if isinstance(value, int) else 0

    def part(self, name: str) -> Values:
        """The object under this name; empty if it is absent."""
        return _object(self.get(name))

    def numbers(self, name: str) -> dict[str, float]:
        """All numbers in the object under this name, by their keys."""
        part = self.part(name)
        return {key: value for key in part if (value := part.number(key)) is not None}

    def items_of(self, name: str) -> list[object]:
        """The items of the list under this name."""
        value = self.get(name)
        return value if isinstance(value, list) else []

    def column(self, name: str) -> list[float | None]:
        """The list under this name; items that are not numbers are replaced by None."""
        return [Values({name: item}).number(name) for item in self.items_of(name)]

    def parts(self, name: str) -> list[Values]:
        """The objects in the list under this name."""
        return [Values(item) for item in self.items_of(name) if isinstance(item, dict)]


@dataclass(frozen=True)
class RunValues:
    """The content of the files of a run folder. A file that does not exist is empty."""

    path: Path
    recipe_text: str
    plan: Values
    report: Values  # empty until the run has a result, and while a resume continues it
    environment: Values
    status: Values
    steps: Sequence[Values]  # one record for each optimizer step
    evaluations: Sequence[Values]
    named_by_path: bool = False

    @property
    def name(self) -> str:
        """The name or the path of the folder. Bytes that are not UTF-8 are escaped."""
        name = str(self.path) if self.named_by_path else self.path.resolve().name
        return os.fsencode(name).decode("utf-8", "backslashreplace")

    @property
    def recipe(self) -> Values:
        """The recipe with its defaults, from plan.json."""
        return self.plan.part("recipe")

    @cached_property
    def objective(self) -> type[ObjectiveSettings]:
        """The settings class of the run's objective."""
        name = self.recipe.part("objective").get("method")
        return objective_class(str(name)) if name in known_names("objectives") else ObjectiveSettings

    @property
    def shows(self) -> Shows:
        """How reports show runs with this run's objective."""
        return self.objective.shows

    @property
    def has_loss(self) -> bool:
        """Whether the training loss shows how good the run is."""
        return self.shows.headline == Headline() and not self.shows.draws

    @property
    def is_log_loss(self) -> bool:
        """Whether the loss is a negative log-probability."""
        return self.objective.is_log_loss(self.recipe.part("objective"))

    def is_learned(self, loss: float) -> bool:
        """Whether nothing is left to learn at this loss."""
        return loss < LEARNED and self.is_log_loss

    @property
    def evaluation_losses(self) -> list[tuple[int, float]]:
        """(step, loss) of each evaluation. Empty if a metric other than the loss shows how good the run is."""
        if self.shows.headline != Headline():
            return []
        pairs = ((record.count("step"), record.part("eval").number("loss")) for record in self.evaluations)
        return [(step, loss) for step, loss in pairs if loss is not None]

    @property
    def exported_step(self) -> int | None:
        """The step of the exported weights. While the run continues, the step of the evaluation that would be exported
        now: of the best one with evaluation.best, else of the last one."""
        if best_step := self.report.count("best_step"):
            return best_step
        watched = str(self.recipe.part("evaluation").get("best") or "").removeprefix("eval.")
        judged = [record for record in self.evaluations if record.count("step") and watched in record.numbers("eval")]
        if not self.report and judged:
            sign = -1 if facts_of("metrics", watched).HIGHER_IS_BETTER else 1
            return min(judged, key=lambda record: sign * record.numbers("eval")[watched]).count("step")
        return max((record.count("step") for record in self.evaluations), default=None)

    @property
    def exported(self) -> Values:
        """The evaluation of the exported weights, or of those that would be exported now. Every page, list and
        comparison shows it as the result. Without evaluations, it is empty."""
        step = self.exported_step
        return next((record for record in self.evaluations if record["step"] == step), Values())

    @cached_property
    def row_losses(self) -> Values:
        """The loss of each evaluation row with the exported weights, in the format of RowLosses; empty if there are
        none."""
        values = _object(read_json(self.path / ROWS_NAME))
        return values if values.get("step") == self.exported_step else Values()

    @cached_property
    def exports(self) -> list[Values]:
        """The exports of the run's result with their certificates, as `tunekit export` recorded them."""
        return Values(exports=read_json(self.path / EXPORTS)).parts("exports")

    @cached_property
    def tasks(self) -> Values:
        """The scores of lm-eval's tasks; empty if none were measured."""
        return _object(read_json(self.path / TASKS_NAME))

    @property
    def is_stopped_by_time(self) -> bool:
        """Whether training.max_minutes ended the run."""
        return str(self.status.get("reason")).startswith(STOPPED_BY_TIME)

    @property
    def state(self) -> str:
        """The state of the run: finished, running, or the reason why it ended. A run was killed if it has not ended but
        no process has its lock."""
        if self.report and not self.status:
            return "finished"
        if self.status.get("exit_code") is None:
            return "running" if is_held(self.path) else "killed; continue with --resume"
        reason = str(self.status.get("reason", "not started")).replace(STOPPED_BY_TIME, "stopped by max_minutes", 1)
        return printable(reason, MOST_NAME)


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """A context manager for reading a run's files: if damaged values raise any error inside the block, it becomes an
    error that names the run.

    Raises: RunFolderError.
    """
    try:
        yield
    except TunekitError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, OSError) as error:
        what = f"{path} is damaged: {type(error).__name__}: {printable(' '.join(str(error).split()), MOST_NAME)}"
        raise RunFolderError(what, "restore the run's files; tunekit --debug shows where the error is") from error


def read_run(path: Path) -> RunValues:
    """The values of a run folder. Raises: InputError if the folder does not contain a run."""
    if not any((path / sign).exists() for sign in RUN_SIGNS):
        how = "name the output.dir of a recipe"
        if (path / "sweep.json").exists():
            how = "it is the folder of a sweep: open sweep.html in it, or name the folder of a trial"
        raise InputError(f"{path} does not contain a run (no plan.json)", how)
    return run_values(path)


def run_values(path: Path) -> RunValues:
    """The values of a folder, in which any file may be absent."""
    plan, report, environment, status = (_object(read_json(path / f"{name}.json")) for name in FILES)
    if status.get("exit_code", 0) != 0:  # a report of a run that was resumed is out of date
        report = Values()
    records = [Values(record) for record in read_metrics(path / METRICS_NAME)]
    text = _start_of(path / "recipe.yaml")
    steps = [record for record in records if "eval" not in record]
    evaluations = [record for record in records if "eval" in record]
    return RunValues(path, text, plan, report, environment, status, steps, evaluations)


def _start_of(path: Path) -> str:
    """The beginning of a text file, up to MOST_CHARACTERS characters."""
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        text, more = file.read(MOST_CHARACTERS), file.read(1)
    return f"{text}\n[... only the start of the file is shown]" if more else text


def _object(value: object) -> Values:
    return Values(value if isinstance(value, dict) else {})


def sizes_counted(runs: Sequence[RunValues]) -> str:
    """The unit of the runs' speeds, such as tokens or pixels."""
    return " / ".join(dict.fromkeys(run.shows.sizes for run in runs))
