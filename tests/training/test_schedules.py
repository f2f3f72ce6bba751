"""Every schedule, step by step, against transformers' function of that name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import get_scheduler

from tunekit.recipe.training import SCHEDULERS, TrainingSection
from tunekit.training.schedules import rate_multiplier, warmup_steps

RATE = 3e-4
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in SCHEDULERS),
    ("cosine", {"num_cycles": 1.25}),
    ("cosine_with_min_lr", {"min_lr": 1e-5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.3, "num_cycles": 1.5}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("polynomial", {"lr_end": 1e-5, "power": 2}),
    ("inverse_sqrt", {"timescale": 7}),
    *(
        ("warmup_stable_decay", {"num_decay_steps": 8, "decay_type": kind, "min_lr_ratio": 0.2})
        for kind in ("linear", "cosine", "1-sqrt")
    ),
    ("warmup_stable_decay", {"num_decay_steps": 38, "num_cycles": 1}),
]
THEIR_DEFAULTS = {"cosine_with_min_lr": {"min_lr_rate": 0.1}, "warmup_stable_decay": {"num_decay_steps": 4}}


@pytest.mark.parametrize("warmup", [0, 1, 5, 39])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_every_step_as_in_transformers(name: str, settings: dict[str, Any], warmup: int) -> None:
    steps = 40
    theirs = "constant_with_warmup" if name == "constant" else name  # whose constant has no warm-up
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=RATE)
    schedule = get_scheduler(
        theirs, optimizer, warmup, steps, scheduler_specific_kwargs=settings or THEIR_DEFAULTS.get(name, {})
    )
    training = TrainingSection(learning_rate=RATE, scheduler=theirs, scheduler_settings=settings)
    for update in range(steps):
        ours = RATE * rate_multiplier(training, update, steps, warmup)
        assert ours == pytest.approx(schedule.get_last_lr()[0], rel=1e-12, abs=1e-20), update
        optimizer.step()
        schedule.step()


def test_warm_up_steps_are_rounded_up() -> None:
    found = [warmup_steps(TrainingSection(warmup_ratio=ratio), 25) for ratio in (0.0, 0.01, 0.03, 0.2, 0.21)]
    assert found == [0, 1, 1, 5, 6]


def test_an_unwritten_decay_is_a_tenth_of_the_steps() -> None:
    training = TrainingSection(scheduler="warmup_stable_decay")
    rates = [rate_multiplier(training, update, 25, 2) for update in range(25)]
    assert rates[:2] == [0.0, 0.5]
    assert rates[2:23] == [1.0] * 21
    assert 1.0 > rates[23] > rates[24] > 0.0
