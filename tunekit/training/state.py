"""A prepared run, and where it is: what train.py puts together, the loop works with, and a checkpoint keeps."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from tunekit.adapters.attach import AttachedAdapter
from tunekit.contracts import Batch, Engine, Objective, Processor, WindowSource
from tunekit.data.batching.windows import BatchSettings
from tunekit.data.rows import RowSet
from tunekit.evaluation.evaluator import Evaluation, is_better
from tunekit.machine.devices import Devices
from tunekit.recipe.bases.section import AdapterSettings
from tunekit.recipe.evaluation import EvaluationSection
from tunekit.recipe.model import ModelSection
from tunekit.recipe.training import TrainingSection
from tunekit.records import DEFAULT_SHOWS, EvaluationRecord, JsonObject, Shows, StepRecord
from tunekit.training.optimizers import Optimizer
from tunekit.training.scaling import LossScale
from tunekit.training.schedules import rate_multiplier
from tunekit.tuned.model import ModelRun, TunedModel


@dataclass
class LoopState:
    """Where the run is; plain values, so that a checkpoint can hold them all."""

    scale: LossScale = field(default_factory=LossScale)
    step: int = 0  # optimizer steps made, skipped ones counted
    updates: int = 0  # steps that changed weights; the schedule's clock
    saved_step: int = 0
    evaluated_step: int = -1
    best_step: int | None = None
    best_value: float | None = None
    evaluations_without_gain: int = 0
    stopped_early: bool = False
    tokens: int = 0
    supervised_tokens: int = 0
    first_losses: list[float] = field(default_factory=list)  # of the first step, before any update
    past_losses: list[float] = field(default_factory=list)  # of the last steps, with which the next one is compared
    useless_steps: dict[str, int] = field(default_factory=dict)  # in a row, of samples that teach nothing, by why
    seconds: dict[str, float] = field(default_factory=dict)
    calibration: JsonObject | None = None  # the pass over the data before step 1
    reactions: list[JsonObject] = field(default_factory=list)  # records.Reaction as plain values
    measured_facts: JsonObject = field(default_factory=dict)  # what the last evaluation decided, for the folder
    split_tokens: int | None = None  # padded tokens from which on micro-batches are split, once one was too large

    def judge(self, settings: EvaluationSection, metrics: Mapping[str, float]) -> bool:
        """Whether an evaluation is the best so far; one before training is only compared with. Says when to stop."""
        if not self.step or (settings.best is None and settings.patience is None):
            return False
        watched = (settings.best or "eval.loss").removeprefix("eval.")
        if is_better(watched, metrics[watched], self.best_value):
            self.best_step, self.best_value, self.evaluations_without_gain = self.step, metrics[watched], 0
            return True
        self.evaluations_without_gain += 1
        self.stopped_early = settings.patience is not None and self.evaluations_without_gain >= settings.patience
        return False


@dataclass(frozen=True)
class Prepared:
    """What plan made on the way and train needs again."""

    model: ModelSection  # as the objective has the base loaded
    processor: Processor
    rows: RowSet
    batch_settings: BatchSettings  # with the micro-batches that plan chose
    adapter: AdapterSettings  # with its texts as token ids
    largest_batch: Batch  # of those that the run makes; of a stream, as large as any could be


@dataclass
class Run:
    """What is trained, with what, and where it is. `save` and `evaluate` are called on every rank."""

    model: TunedModel
    objective: Objective
    engine: Engine
    optimizer: Optimizer
    devices: Devices
    windows: WindowSource
    training: TrainingSection
    evaluation: EvaluationSection
    warmup_steps: int
    state: LoopState
    save: Callable[[], None]
    record: Callable[[StepRecord | EvaluationRecord], None] = lambda record: None
    evaluate: Callable[[], Evaluation] | None = None
    keep_rows: Callable[[int, Evaluation], None] = lambda step, found: None  # of the weights to be exported, if no more
    keep_pictures: Callable[[int, Evaluation], None] = lambda step, found: None
    stop_signal: Callable[[], int] = lambda: 0  # 0, or the number of the signal that asked to stop
    peak_bytes: Callable[[], int] = lambda: 0
    warn: Callable[[str], None] = lambda text: None
    shows: Shows = DEFAULT_SHOWS
    spare: Batch | None = None  # of several ranks: the batch that keeps a rank in step which has none left

    @property
    def adapter(self) -> AttachedAdapter:
        """What is trained."""
        assert self.model.adapter is not None
        return self.model.adapter

    def view(self) -> ModelRun:
        """The run as its objective and companions see it."""
        return ModelRun(self.model, self.objective.rows, self.devices.gather)

    @property
    def reads_later(self) -> bool:
        """Whether a step's numbers are read one step later: where the device itself keeps a non-finite update off."""
        return self.optimizer.gated and not self.state.scale.enabled and self.model.device.type != "cpu"

    def shows_samples(self, step: int) -> bool:
        """Whether samples of a step are kept for the report: of the first, the last and those that are evaluated."""
        return step in (1, self.windows.steps) or step % self.training.eval_steps == 0

    def rate(self) -> float:
        """Multiplier of the learning rate of the next update."""
        return rate_multiplier(self.training, self.state.updates, self.windows.steps, self.warmup_steps)


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the block's time to `part` of the report's seconds."""
    started = time.monotonic()
    try:
        yield
    finally:
        add_seconds(seconds, {part: time.monotonic() - started})


def add_seconds(seconds: dict[str, float], spent: Mapping[str, float]) -> None:
    """Add times to those of each part of the report."""
    for part, more in spent.items():
        seconds[part] = seconds.get(part, 0.0) + more
