"""Four steps of training with variants of methods: it learns, every trained tensor moves, and a resume is exact.

What each method does as it is stands in test_every_method_trains.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.loop_case import check_four_steps
from tests.support.product_methods import PRODUCTS
from tests.support.vector_methods import VECTORS
from tunekit.recipe.reading.names import known_names

RATES = {"lokr-both": 1e-1}
CHANGES: dict[str, dict[str, Any]] = {"ia3-feedforward": {"feedforward_modules": ("down_proj",)}}
VARIANTS = {name: make for name, make in (PRODUCTS | VECTORS).items() if name not in known_names("adapters")}


def settings_of(name: str) -> Any:
    return VARIANTS[name]().model_copy(
        update={"target_modules": ("q_proj", "v_proj", "down_proj"), **CHANGES.get(name, {})}
    )


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", VARIANTS)
def test_four_steps(name: str, tiny_llama: Path) -> None:
    check_four_steps(tiny_llama, settings_of(name), RATES.get(name, 2e-2))
