"""The LoRA family against peft: five checks in each cell, from adapters that are not as they start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest

from tests.parity.peft_case import BASES, CHECKS, run_cell
from tunekit.recipe.names import settings_class

FAMILIES = ("llama", "gpt2", "t5", "bert", "mixtral")
TABLE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # case: method, our settings, peft's fields
    "lora": ("lora", {}, {}),
    "dora": ("dora", {}, {"use_dora": True}),
    "dora-rslora": ("dora", {"use_rslora": True}, {"use_dora": True, "use_rslora": True}),
}


def settings_and_config(case: str, family: str) -> tuple[Any, peft.PeftConfig]:
    method, own, fields = TABLE[case]
    base = BASES[family]
    targets = (*base.attention, *base.feedforward)
    settings = settings_class("adapters", method)(**{"r": 4, "alpha": 6.0, "target_modules": targets, **own})
    return settings, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(targets), **fields})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", TABLE)
def test_cell(case: str, family: str, tmp_path: Path) -> None:
    settings, config = settings_and_config(case, family)
    cell = run_cell(settings, config, family, tmp_path)
    assert not cell.failures, cell.failures
    assert tuple(cell.passed) == CHECKS
