"""The Run: all objects that the training loop uses. Also the LoopState: the progress of a run, which a checkpoint
contains."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from tunekit.adapters.attach import AttachedAdapter
from tunekit.contracts import Batch, Engine, Objective, Processor, Window, WindowSource
from tunekit.evaluation.evaluator import Evaluation, is_better
from tunekit.machine.cpu_times import CpuTimes
from tunekit.machine.devices import Devices
from tunekit.recipe.evaluation import EvaluationSection
from tunekit.recipe.model import ModelSection
from tunekit.recipe.training import TrainingSection
from tunekit.records import DEFAULT_SHOWS, EvaluationRecord, JsonObject, Reaction, Shows, StepRecord
from tunekit.training.optimizers import Optimizer
from tunekit.training.scaling import LossScale
from tunekit.training.schedules import rate_multiplier
from tunekit.tuned.model import ModelRun, TunedModel

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


@dataclass
class Run:
    """A run: its model, objective, data and state. All ranks call `save` and `evaluate`."""

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
    starting: Callable[[int], None] = lambda step: None  # called before the first step of this process
    evaluate: Callable[[], Evaluation] | None = None
    keep_rows: Callable[[int, Evaluation], None] = lambda step, evaluation: None  # writes losses of rows
    keep_pictures: Callable[[int, Evaluation], None] = lambda step, evaluation: None
    stop_signal: Callable[[], int] = lambda: 0  # 0, or the number of the signal that requested the stop
    peak_bytes: Callable[[], int] = lambda: 0
    warn: Callable[[str], None] = lambda text: None
    shows: Shows = DEFAULT_SHOWS
    pace: list[CpuTimes] = field(default_factory=list)  # of the last steps on a CPU, see pace.py
    earlier: Window | None = None  # the prepared previous step, if several steps reuse its samples
    spare: Batch | None = None  # with several ranks, a batch for ranks that have fewer micro-batches than others

    @property
    def adapter(self) -> AttachedAdapter:
        """The trained adapter."""
        assert self.model.adapter is not None
        return self.model.adapter

    def view(self) -> ModelRun:
        """The parts of the run that the objective and its companions (auxiliary models) may use."""
        return ModelRun(self.model, self.objective.rows, self.devices.gather, on_split=self._note_split)

    def _note_split(self, size: str) -> None:
        """Warn and record that memory ran out while a step was prepared, once for each size."""
        what = f"{size} ran out of memory while a step was prepared"
        if all(reaction["probe"] != what for reaction in self.state.reactions):
            action = "split in two, which does not change the result"
            self.state.reactions.append(asdict(Reaction(what, action, self.state.step + 1)))
            self.warn(f"step {self.state.step + 1}: {what}; split in two")

    def prepare_step(self, window: Window) -> Window:
        """The step's micro-batches, prepared by the objective. They are kept if later steps reuse their samples."""
        planned = self.objective.prepare_step(self.view(), window, self.earlier)
        self.earlier = planned if self.objective.loss.updates_per_sampling > 1 else None
        return planned

    @property
    def can_resume(self) -> bool:
        """Whether a run can resume after this step. Checkpoints do not contain the samples that later steps reuse."""
        return self.state.step % self.objective.loss.updates_per_sampling == 0

    @property
    def reads_later(self) -> bool:
        """Whether a step's loss and norm are read one step later. This is possible if the device itself skips a
        non-finite update."""
        return self.optimizer.gated and not self.state.scale.enabled and self.model.device.type != "cpu"

    @property
    def computes_on_cpu(self) -> bool:
        """Whether the steps are computed on a CPU, by threads of this process."""
        return self.model.device.type == "cpu"

    @property
    def adapts_threads(self) -> bool:
        """Whether the number of threads may fall during the run."""
        return self.computes_on_cpu and self.training.threads == "adaptive"

    def shows_samples(self, step: int) -> bool:
        """Whether the report shows samples of this step: the first step, the last step, and steps with an
        evaluation."""
        return step in (1, self.windows.steps) or step % self.training.eval_steps == 0

    def rate(self) -> float:
        """Multiplier of the learning rate of the next update."""
        return rate_multiplier(self.training, self.state.updates, self.windows.steps, self.warmup_steps)


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
