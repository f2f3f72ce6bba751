"""Four steps of training with variants of methods: it learns, every trained tensor moves, and a resume is exact.

What each method does as it is stands in test_every_method_trains.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.loop_case import Case, make_case, make_rows
from tests.support.product_methods import PRODUCTS
from tests.support.vector_methods import VECTORS
from tunekit.recipe.reading.names import known_names
from tunekit.recipe.training import TrainingSection

RATES = {"lokr-both": 1e-1}
CHANGES: dict[str, dict[str, Any]] = {"ia3-feedforward": {"feedforward_modules": ("down_proj",)}}
VARIANTS = {name: make for name, make in (PRODUCTS | VECTORS).items() if name not in known_names("adapters")}


def settings_of(name: str) -> Any:
    return VARIANTS[name]().model_copy(
        update={"target_modules": ("q_proj", "v_proj", "down_proj"), **CHANGES.get(name, {})}
    )


def run(folder: Path, name: str, rate: float, checkpointed: int = 0) -> Case:
    case = start(folder, name, rate, checkpointed)
    case.run()
    return case


def start(folder: Path, name: str, rate: float, checkpointed: int = 0) -> Case:
    """Four steps over the same eight rows, so that the losses of two rates can be compared."""
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
    return make_case(folder, make_rows(8), training=section, adapter=settings_of(name), checkpointed=checkpointed)


def weights(case: Case) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in case.adapter.state().items()}


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", VARIANTS)
def test_four_steps(name: str, tiny_llama: Path) -> None:
    rate = RATES.get(name, 2e-2)
    still = run(tiny_llama, name, 0.0)
    first = start(tiny_llama, name, rate)
    before = weights(first)
    first.run()
    after = weights(first)
    assert all(not torch.equal(before[key], after[key]) for key in first.adapter.trained())
    trained = first.adapter.trained()
    assert [key for key in after if key not in trained and not torch.equal(before[key], after[key])] == []
    assert first.losses[-1] < still.losses[-1]
    assert_same_bits(weights(run(tiny_llama, name, rate, checkpointed=2)), after)
    stopped = start(tiny_llama, name, rate)
    resumed = start(tiny_llama, name, rate)
    resumed.run_after_a_stop(stopped, 2)
    assert_same_bits(weights(resumed), after)
