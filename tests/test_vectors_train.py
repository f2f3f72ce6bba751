"""Four steps of training with every scale and vector: it learns, every trained tensor moves, and a resume is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract.vector_methods import VECTORS
from tests.loop_case import Case, make_case, make_rows
from tunekit.errors import Stopped
from tunekit.recipe.training import TrainingSection
from tunekit.training.parts import LoopState
from tunekit.training.saved_state import checkpoint_facts, checkpoint_tensors, restore

RATE = 2e-2
NAMES = ("q_proj", "v_proj", "down_proj")
CHANGES: dict[str, dict[str, Any]] = {"ia3-feedforward": {"feedforward_modules": ("down_proj",)}}
RATES: dict[str, float] = {"c3a": 1.0}


def start(folder: Path, name: str, rate: float, checkpointed: int = 0) -> Case:
    """Four steps over the same eight rows, so that the losses of two rates can be compared."""
    settings = VECTORS[name]()
    settings = settings.model_copy(update={"target_modules": NAMES, **CHANGES.get(name, {})})
    section = TrainingSection(
        learning_rate=rate,
        scheduler="constant",
        warmup_ratio=None,
        epochs=None,
        max_steps=4,
        micro_batch_size=4,
        gradient_accumulation_steps=2,
        weight_decay=0.1,
    )
    return make_case(folder, make_rows(8), training=section, adapter=settings, checkpointed=checkpointed)


def run(folder: Path, name: str, rate: float, checkpointed: int = 0) -> Case:
    case = start(folder, name, rate, checkpointed)
    case.run()
    return case


def state(case: Case) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in case.adapter.state().items()}


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", VECTORS)
def test_four_steps(name: str, tiny_llama: Path) -> None:
    rate = RATES.get(name, RATE)
    still, whole = run(tiny_llama, name, 0.0), start(tiny_llama, name, rate)
    before = state(whole)
    whole.run()
    after = state(whole)
    trained = whole.adapter.trained()
    assert [key for key in trained if torch.equal(before[key], after[key])] == []
    assert [key for key in after if key not in trained and not torch.equal(before[key], after[key])] == []
    assert whole.losses[-1] < still.losses[-1]
    assert_same_bits(state(run(tiny_llama, name, rate, checkpointed=2)), after)
    stopped, resumed = start(tiny_llama, name, rate), start(tiny_llama, name, rate)
    stopped.parts.stop_signal = lambda: 15 if len(stopped.losses) >= 2 else 0
    reached = LoopState()
    with pytest.raises(Stopped):
        stopped.run(reached)
    tensors = {key: value.clone() for key, value in checkpoint_tensors(stopped.optimizer, stopped.adapter).items()}
    facts = checkpoint_facts(stopped.optimizer, reached, {})
    resumed.run(restore(tensors, facts, resumed.optimizer, resumed.adapter))
    assert_same_bits(state(resumed), after)
