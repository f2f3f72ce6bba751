"""The numbers of a step, which are read one step later on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tunekit.contracts import StepBatches
from tunekit.training import step_numbers
from tunekit.training.step_numbers import StepNumbers


class Copy:
    """A copy to the host that ends at a moment of a clock."""

    def __init__(self, clock: list[float], ends: float) -> None:
        self.clock, self.ends = clock, ends

    def query(self) -> bool:
        return self.clock[0] >= self.ends

    def synchronize(self) -> None:
        self.clock[0] = max(self.clock[0], self.ends)


def test_seconds_of_steps_are_never_negative_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is behind the host in step 1, and ahead of it in step 2, whose end nobody saw."""
    clock = [0.0]
    monkeypatch.setattr(step_numbers.time, "monotonic", lambda: clock[0])

    def reading(step: int, started: float, sent: float, ends: float) -> StepNumbers:
        copied: Any = Copy(clock, ends)
        step, numbers = StepBatches(step, 0.0, (), ()), torch.zeros(2, dtype=torch.float64)
        return StepNumbers(step, step, [], [8.0, 8.0, 1.0], numbers, [], copied, started, sent)

    first, second = reading(1, 0.0, 1.0, 5.0), reading(2, 1.0, 2.0, 6.0)
    clock[0] = 2.0
    assert first.arrival(0.0) == 5.0
    clock[0] = 9.0
    assert second.arrival(5.0) == 9.0
    assert first.record(0.0, 0.0, 0.0, 0, shown=False).tokens_per_second > 0, "a coarse clock"
