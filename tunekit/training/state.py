"""Defines LoopState, the progress of a run, which a checkpoint contains. Also counts the seconds of a run's parts."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from tunekit.contracts import Processor
from tunekit.evaluation.evaluator import is_better
from tunekit.recipe.evaluation import EvaluationSection
from tunekit.recipe.model import ModelSection
from tunekit.records import JsonObject
from tunekit.training.scaling import LossScale

Processors = dict[tuple[str, ModelSection], Processor]  # by the objective's family and the base


@dataclass
class LoopState:
    """The progress of a run. It has only plain values, which a checkpoint can contain."""

    scale: LossScale = field(default_factory=LossScale)
    step: int = 0  # optimizer steps, including skipped ones
    updates: int = 0  # steps that changed weights; the schedule counts these
    saved_step: int = 0
    evaluated_step: int = -1
    best_step: int | None = None
    best_value: float | None = None
    evaluations_without_gain: int = 0
    stopped_early: bool = False
    tokens: int = 0
    supervised_tokens: int = 0
    first_losses: list[float] = field(default_factory=list)  # the loss of the first step, before any update
    past_losses: list[float] = field(default_factory=list)  # the losses of the last steps, to compare with the next one
    # consecutive steps whose samples teach nothing, by reason
    useless_steps: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    longest: dict[str, float] = field(default_factory=dict)  # the longest evaluation, save and export, in seconds
    starts: list[JsonObject] = field(default_factory=list)  # records.StartRecord as plain values
    calibration: JsonObject | None = None  # the pass over the data before step 1
    reactions: list[JsonObject] = field(default_factory=list)  # records.Reaction as plain values
    measured_facts: JsonObject = field(default_factory=dict)  # facts that the last evaluation decided, for the folder
    split_tokens: int | None = None  # micro-batches with this many padded tokens or more are split

    def judge(self, settings: EvaluationSection, metrics: Mapping[str, float]) -> bool:
        """Return whether an evaluation is the best so far. If it is not, count it for early stopping. The evaluation
        before training is only a reference and is not judged."""
        if not self.step or (settings.best is None and settings.patience is None):
            return False
        watched = (settings.best or "eval.loss").removeprefix("eval.")
        if is_better(watched, metrics[watched], self.best_value):
            self.best_step, self.best_value, self.evaluations_without_gain = self.step, metrics[watched], 0
            return True
        self.evaluations_without_gain += 1
        self.stopped_early = settings.patience is not None and self.evaluations_without_gain >= settings.patience
        return False

    def note_time(self, seconds: float) -> None:
        """Note the time of this start so far, for the report."""
        self.starts[-1] |= {"last_step": self.step, "minutes": round(seconds / 60, 3)}

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """A context manager that adds the time of its block to the seconds of `part`, and keeps the longest time."""
        before = self.seconds.get(part, 0.0)
        with timed(self.seconds, part):
            yield
        self.longest[part] = max(self.longest.get(part, 0.0), self.seconds[part] - before)


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """A context manager that adds the time of its block to `part` of the report's seconds."""
    started = time.monotonic()
    try:
        yield
    finally:
        add_seconds(seconds, {part: time.monotonic() - started})


def add_seconds(seconds: dict[str, float], spent: Mapping[str, float]) -> None:
    """Add times to each part of the report's seconds."""
    for part, more in spent.items():
        seconds[part] = seconds.get(part, 0.0) + more
