"""What an objective sees of a run: companions by their protocol, and the rows of a step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.pair_case import on_two_ranks
from tunekit.companions.base import make_companions
from tunekit.companions.rewards import RewardFunctions
from tunekit.companions.sampling import SamplingMemory
from tunekit.contracts import Companion, CompanionSpec, Gather, StepBatches
from tunekit.objectives.losses.divergence import Teacher
from tunekit.objectives.losses.samples import Rewarder, Sampler
from tunekit.recipe.objectives.grpo import GrpoSettings
from tunekit.tuned.model import ModelRun

SETTINGS = GrpoSettings.model_validate({"reward": [{"regex": "a"}]})
SPECS = [CompanionSpec("rewards", "objective.reward", SETTINGS), CompanionSpec("sampling", "other", SETTINGS)]


def run_of(companions: dict[str, Companion], gather: Gather = list) -> ModelRun:
    model: Any = SimpleNamespace(companions=companions)
    rows: Any = None
    return ModelRun(model, rows, gather)


def test_a_companion_is_found_by_the_protocol_of_its_loss() -> None:
    run = run_of(make_companions(SPECS))
    assert isinstance(run.companion(Rewarder), RewardFunctions)
    assert isinstance(run.companion(Sampler), SamplingMemory)
    assert run.companion(Sampler).key == "other"
    with pytest.raises(ValueError, match="not enough values"):
        run.companion(Teacher)


def test_two_companions_of_one_protocol_are_an_error() -> None:
    twice = [*SPECS, CompanionSpec("rewards", "objective.second", SETTINGS)]
    with pytest.raises(TypeError, match=r"objective\.reward and objective\.second are both a Reward"):
        make_companions(twice)


def test_rows_are_gathered_in_the_order_of_the_step() -> None:
    step = torch.arange(24).view(12, 2) / 7
    parts = step.split([3, 1, 4, 2, 2])

    def gathered(rank: int, gather: Gather) -> torch.Tensor:
        indices = [(3, 0, 1), (2, 4)][rank]
        return run_of({}, gather).gather_rows(StepBatches(0, 0.0, indices, ()), [parts[index] for index in indices])

    assert all(torch.equal(rows, step) for rows in on_two_ranks(gathered))
    alone = run_of({}).gather_rows(StepBatches(0, 0.0, tuple(range(5)), ()), parts)
    assert torch.equal(alone, step)
    assert not alone.requires_grad
