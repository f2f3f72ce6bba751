"""The LoRA family against peft: five checks in each cell, from adapters that are not as they start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from tests.support.peft_case import BASES, CHECKS, COLUMNS, run_cell
from tunekit.adapters.attach import attach_adapter
from tunekit.recipe.reading.names import settings_class

HEADS, NORMS = ("heads",), ("norms",)  # stand for the family's own
TABLE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # case: method, our settings, peft's fields
    "lora": ("lora", {}, {}),
    "lora_fa": ("lora_fa", {}, {}),
    "dora": ("dora", {}, {"use_dora": True}),
    "dora-rslora": ("dora", {"use_rslora": True}, {"use_dora": True, "use_rslora": True}),
    "bias-all": ("lora", {"bias": "all"}, {"bias": "all"}),
    "bias-lora_only": ("lora", {"bias": "lora_only"}, {"bias": "lora_only"}),
    "dora-bias": ("dora", {"bias": "all"}, {"bias": "all", "use_dora": True}),
    "layers": ("lora", {"layers_to_transform": (1,)}, {"layers_to_transform": [1]}),
    "layers-pattern": (
        "dora",
        {"layers_to_transform": (0,), "layers_pattern": ("layers", "h", "block", "layer")},
        {"layers_to_transform": 0, "layers_pattern": ["layers", "h", "block", "layer"], "use_dora": True},
    ),
    "modules_to_save": ("lora", {"modules_to_save": HEADS}, {"modules_to_save": list(HEADS)}),
    "modules_to_save-dora": ("dora", {"modules_to_save": NORMS}, {"modules_to_save": list(NORMS), "use_dora": True}),
}
# Each base has some of these; peft lets the others pass, and in a recipe they would be errors.
OF_FAMILY = {
    "llama": {HEADS: ("lm_head", "embed_tokens"), NORMS: ("input_layernorm",)},
    "gpt2": {HEADS: ("wte",), NORMS: ("ln_f",)},
    "t5": {HEADS: ("lm_head",), NORMS: ("final_layer_norm",)},
    "bart": {HEADS: ("lm_head",), NORMS: ("final_layer_norm",)},
    "bert": {HEADS: ("classifier",), NORMS: ("pooler",)},
    "mixtral": {HEADS: ("lm_head",), NORMS: ("post_attention_layernorm", "gate")},
}


def settings_and_config(case: str, family: str) -> tuple[Any, peft.PeftConfig]:
    method, own, fields = TABLE[case]
    base = BASES[family]
    if "modules_to_save" in own:
        names = OF_FAMILY[family][own["modules_to_save"]]
        own, fields = {**own, "modules_to_save": names}, {**fields, "modules_to_save": list(names)}
    targets = (*base.attention, *base.feedforward)
    settings = settings_class("adapters", method)(**{"r": 4, "alpha": 6.0, "target_modules": targets, **own})
    return settings, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(targets), **fields})


def leave_as_it_is(theirs: nn.Module) -> None:
    """Train what peft trains."""


def freeze_a(theirs: nn.Module) -> None:
    """LoRA-FA, which peft leaves to an optimizer."""
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)


@pytest.mark.parametrize("family", COLUMNS)
@pytest.mark.parametrize("case", TABLE)
def test_cell(case: str, family: str, tmp_path: Path) -> None:
    settings, config = settings_and_config(case, family)
    cell = run_cell(settings, config, family, tmp_path, prepare=freeze_a if case == "lora_fa" else leave_as_it_is)
    assert not cell.failures, cell.failures
    assert tuple(cell.passed) == CHECKS


@pytest.mark.parametrize("start", ["gaussian", "orthogonal"])
def test_starts_draw_from_the_distributions_of_peft(start: str) -> None:
    """Size of A and B, and of B A, over all layers: the generators differ, so that only these can be compared."""
    targets = BASES["llama"].attention
    settings = settings_class("adapters", "lora")(r=8, alpha=8.0, target_modules=targets, start=start)
    ours = attach_adapter(BASES["llama"].make(), settings, seed=1, head_name="lm_head")
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=list(targets), init_lora_weights=start)
    torch.manual_seed(1)
    other = {n: p for n, p in peft.get_peft_model(BASES["llama"].make(), config).named_parameters() if p.requires_grad}
    for letter in ("lora_A", "lora_B"):
        left = torch.cat([p.detach().flatten() for n, p in ours.trained().items() if letter in n])
        right = torch.cat([p.detach().flatten() for n, p in other.items() if letter in n])
        assert abs(left.std() - right.std()) <= 0.1 * right.std()
        assert (start == "orthogonal" or letter == "lora_A") == bool(left.abs().max() > 0)
    for layer in ours.layers.values():
        assert layer.delta().abs().max() < 1e-6
