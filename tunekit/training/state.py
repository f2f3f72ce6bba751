"""What the loop works with, and where it is.

Comes in: everything train.py made.  Goes out: LoopParts and LoopState.  Next: loop.py; saved_state.py keeps LoopState.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tunekit.contracts import Engine, Objective, WindowSource
from tunekit.machine.devices import Devices
from tunekit.recipe.training import TrainingSection
from tunekit.records import EvaluationRecord, StepRecord
from tunekit.training.optimizers import Optimizer
from tunekit.training.scaling import INITIAL_SCALE, LossScale
from tunekit.training.schedules import rate_multiplier
from tunekit.tuned.model import TunedModel


@dataclass
class LoopState:
    """Where the run is; plain values, so that a checkpoint can hold them all."""

    step: int = 0  # optimizer steps made, skipped ones counted
    updates: int = 0  # steps that changed weights; the schedule's clock
    evaluated_step: int = 0
    best_step: int | None = None
    best_value: float | None = None
    evaluations_without_gain: int = 0
    stopped_early: bool = False
    tokens: int = 0
    supervised_tokens: int = 0
    loss: float | None = None
    loss_scale: float = INITIAL_SCALE
    good_steps: int = 0
    skipped_steps: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None  # the pass over the data before step 1
    reactions: list[dict[str, Any]] = field(default_factory=list)  # decisions.Reaction as plain values
    split_tokens: int | None = None  # padded tokens from which on micro-batches are split, once one was too large


@dataclass
class LoopParts:
    """What the loop works with. `evaluate` and `save` run on every rank; `record` does its work on the main one."""

    model: TunedModel
    objective: Objective
    engine: Engine
    optimizer: Optimizer
    devices: Devices
    windows: WindowSource
    settings: TrainingSection
    warmup_steps: int
    scale: LossScale
    record: Callable[[StepRecord | EvaluationRecord], None]
    save: Callable[[LoopState], None]
    evaluate: Callable[[], dict[str, float]] | None
    is_better: Callable[[float, float | None], bool]
    watched_metric: str | None  # what best and patience look at
    saves_best: bool
    patience: int | None
    stop_signal: Callable[[], int]  # 0, or the number of the signal that asked to stop
    peak_bytes: Callable[[], int]

    @property
    def reads_later(self) -> bool:
        """Whether a step's numbers are read one step later: where the device itself keeps a non-finite update off."""
        return self.optimizer.gated and not self.scale.enabled and self.model.device.type == "cuda"

    def rate(self, updates: int) -> float:
        """Multiplier of the learning rate of the next update."""
        return rate_multiplier(self.settings.scheduler, updates, self.windows.steps, self.warmup_steps)
