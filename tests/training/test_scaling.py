"""float16's loss scale: what a step whose gradients overflow leaves alone, and how the scale moves."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.loop_case import make_case, make_rows
from tunekit.errors import NumericsError
from tunekit.recipe.training import TrainingSection
from tunekit.records import StepRecord
from tunekit.training.engine import StepResult, StepWork
from tunekit.training.state import LossScale, checkpoint_facts, checkpoint_tensors, restore


def test_an_overflow_moves_neither_schedule_nor_adapter_and_halves_the_scale(tiny_llama: Path) -> None:
    section = TrainingSection(learning_rate=1e-2, scheduler="linear", warmup_ratio=None, epochs=None, max_steps=6)
    case = make_case(tiny_llama, make_rows(12), training=section)
    state = case.parts.state
    state.scale = LossScale(True, 16.0)
    after_step = case.adapter.after_step
    seen, told = list[tuple[float, list[Tensor]]](), list[int]()

    def overflowing(run: Callable[[], StepResult], work: StepWork) -> StepResult:
        seen.append((state.scale.scale, [value.detach().clone() for value in case.adapter.trained().values()]))
        result = run()
        if state.step == 2:
            case.optimizer.gradients()[0][0] = math.inf
        return result

    def counted(step: int, total: int) -> None:
        told.append(step)
        after_step(step, total)

    case.around_steps(overflowing)
    case.adapter.after_step = counted  # type: ignore[method-assign]
    case.parts.train()
    rates = [record.learning_rate for record in case.records if isinstance(record, StepRecord)]
    assert rates == pytest.approx([1e-2 * (1 - update / 6) for update in (0, 1, 2, 2, 3, 4)])
    assert told == [0, 1, 3, 4, 5]
    assert [scale for scale, _ in seen] == [16, 16, 16, 8, 8, 8]
    assert all(map(torch.equal, seen[3][1], seen[2][1]))
    assert (state.step, state.updates, state.scale.skipped_steps) == (6, 5, 1)
    tensors, facts = checkpoint_tensors(case.optimizer, case.adapter), checkpoint_facts(case.optimizer, state, {})
    assert restore(tensors, facts, case.optimizer, case.adapter).scale == LossScale(True, 8.0, 3, 1)


def test_the_scale_doubles_after_enough_finite_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunekit.training.state.GROWTH_INTERVAL_STEPS", 3)
    scale, found = LossScale(True, 8.0), []
    for finite in (True, True, False, True, True, True, True):
        scale.update(finite, 1)
        found.append(scale.scale)
    assert found == [8, 8, 4, 4, 4, 8, 8]
    for step in (2, 3, 4):
        scale.update(False, step)
    with pytest.raises(NumericsError, match="step 5: gradients overflow in float16 even with the smallest loss scale"):
        scale.update(False, 5)
