"""The progress of a run (LoopState), the loss scale of float16, and a checkpoint: its content, and how it is restored.

A checkpoint contains no state of random generators: every random number is a function of (seed, step, place).
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from tunekit.adapters.attach import AttachedAdapter
from tunekit.contracts import Processor, Tensors
from tunekit.errors import NumericsError, RunFolderError
from tunekit.evaluation.evaluator import is_better
from tunekit.recipe.evaluation import EvaluationSection
from tunekit.recipe.model import ModelSection
from tunekit.records import JsonObject
from tunekit.targets.export import BUFFER_PREFIX, REFERENCE_PREFIX, with_prefix
from tunekit.training.optimizers import Optimizer

INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL_STEPS = 2000


@dataclass
class LossScale:
    """The loss scale for float16. `scale` is a power of two, so that scaling and unscaling are exact. If `enabled` is
    false, losses are not scaled (`factor` is 1)."""

    enabled: bool = False
    scale: float = INITIAL_SCALE
    good_steps: int = 0
    skipped_steps: int = 0

    @property
    def factor(self) -> float:
        """The factor that multiplies the loss."""
        return self.scale if self.enabled else 1.0

    def update(self, finite: bool, step: int) -> None:
        """Double after GROWTH_INTERVAL_STEPS finite steps, halve after an overflow.

        Raises: NumericsError if the scale falls below 1, because then the gradients themselves are not finite.
        """
        if not self.enabled:
            return
        if finite:
            self.good_steps += 1
            if self.good_steps >= GROWTH_INTERVAL_STEPS:
                self.scale, self.good_steps = self.scale * 2.0, 0
            return
        self.scale, self.good_steps, self.skipped_steps = self.scale / 2.0, 0, self.skipped_steps + 1
        if self.scale < 1.0:
            how = "use model.dtype=bfloat16 or float32, or a smaller training.learning_rate"
            raise NumericsError(f"step {step}: gradients overflow in float16 even with the smallest loss scale", how)


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


def checkpoint_tensors(
    optimizer: Optimizer, adapter: AttachedAdapter, reference: Mapping[str, Tensor] | None = None
) -> Tensors:
    """All tensors that an exact resume needs. `reference`: the adapter's state at step 0; None if the loss does not
    need it."""
    buffers = {BUFFER_PREFIX + name: tensor for name, tensor in adapter.state(("saved", "resume")).items()}
    reference_tensors = {REFERENCE_PREFIX + name: tensor for name, tensor in (reference or {}).items()}
    return optimizer.state_tensors() | buffers | reference_tensors


def checkpoint_facts(optimizer: Optimizer, state: LoopState, fingerprint: Mapping[str, Any]) -> JsonObject:
    """All values that an exact resume needs, except tensors."""
    return {
        "loop": asdict(state),
        "layout": optimizer.layout(),
        "fingerprint": dict(fingerprint),
        "threads": torch.get_num_threads(),
    }


def restore(
    tensors: Mapping[str, Tensor], facts: Mapping[str, Any], optimizer: Optimizer, adapter: AttachedAdapter
) -> LoopState:
    """Restore a checkpoint and return its loop state.

    Raises: RunFolderError if the checkpoint does not fit the adapter or the optimizer.
    """
    buffers = with_prefix(tensors, BUFFER_PREFIX)
    expected = adapter.state(("saved", "resume"))
    if set(buffers) != set(expected):
        raise RunFolderError(
            "the checkpoint's adapter state does not fit this adapter", "resume with the tunekit version that wrote it"
        )
    optimizer.load_state(tensors, facts["layout"])
    adapter.load_state(buffers, kinds=("saved", "resume"))
    loop = facts["loop"]
    return LoopState(**(loop | {"scale": LossScale(**loop["scale"])}))


def restore_reference(tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's reference state into the given tensors.

    Raises: RunFolderError if the checkpoint has no reference state, or the state of a different adapter.
    """
    saved = with_prefix(tensors, REFERENCE_PREFIX)
    if set(saved) != set(targets) or any(saved[name].shape != tensor.shape for name, tensor in targets.items()):
        what = "the checkpoint contains no state of the reference model that fits this adapter"
        raise RunFolderError(what, "resume with the tunekit version that wrote it")
    for name, tensor in targets.items():
        tensor.copy_(saved[name])
