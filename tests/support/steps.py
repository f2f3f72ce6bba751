"""Runs one step of a model without a run, for tests."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tunekit.contracts import Objective, StepBatches
from tunekit.training.engine import StepResult, StepWork
from tunekit.training.streaming import make_engine
from tunekit.tuned.model import TunedModel


def run_step(model: TunedModel, objective: Objective, step: StepBatches, units: Tensor, **more: Any) -> StepResult:
    """The forward and backward of a step. `more`: further values of its StepWork."""
    [result] = make_engine(model).run([StepWork(model, objective, step, units, **{"seed": 0, **more})])
    return result.checked()
