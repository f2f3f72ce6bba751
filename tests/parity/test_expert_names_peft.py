"""Mixtures in which peft takes layers named as former experts for parts of fused ones: written and read anyway."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from tests.architectures.tiny import make_tiny
from tests.support.peft_case import close, move_from_start
from tunekit.adapters.attach import attach_adapter
from tunekit.adapters.folder.read import attach_adapter_folder, load_into, save_adapter_folder
from tunekit.adapters.targets import find_targets
from tunekit.errors import RecipeError
from tunekit.recipe.adapters.dora import DoraSettings
from tunekit.recipe.adapters.lora import LoraSettings

IDS = torch.arange(3, 27)[None]
SHARED = ("deepseek_v3", "glm4_moe", "qwen3_next")  # with dense or shared MLPs beside their experts


def logits(net: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = net(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("model_type", SHARED)
def test_peft_reads_what_is_written(model_type: str, tmp_path: Path) -> None:
    net = make_tiny(model_type)
    plain, settings = logits(net), LoraSettings(r=4, dropout=0.1, rank_pattern={"gate_proj": 2})
    attached = attach_adapter(net, settings, seed=0, head_name="lm_head")
    move_from_start(attached.trained().values(), 0.1)
    ours = logits(net.eval())
    assert (ours - plain).abs().max() > 0.1
    save_adapter_folder(attached, tmp_path / "a", base_name="org/base", base_fingerprint=None, revision=None)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing adapter keys|unexpected).*")
        theirs = peft.PeftModel.from_pretrained(make_tiny(model_type), str(tmp_path / "a")).eval()
    close(logits(theirs), ours)
    again = make_tiny(model_type)
    assert attach_adapter_folder(again, tmp_path / "a", head_name="lm_head").targets == attached.targets
    close(logits(again), ours)
    load_into(attach_adapter(make_tiny(model_type), settings, seed=1, head_name="lm_head"), tmp_path / "a")


@pytest.mark.parametrize("model_type", [*SHARED, "mixtral"])
def test_what_peft_makes_of_all_linear_is_read(model_type: str, tmp_path: Path) -> None:
    """Experts, and the router's matrix under target_parameters."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(make_tiny(model_type), config).eval()
    move_from_start((parameter for name, parameter in theirs.named_parameters() if "lora_" in name), 0.1)
    theirs.save_pretrained(str(tmp_path))
    assert "gate.weight" in json.loads((tmp_path / "adapter_config.json").read_text())["target_parameters"]
    net = make_tiny(model_type)
    attached = attach_adapter_folder(net, tmp_path, head_name="lm_head")
    close(logits(net), logits(theirs))
    merged = {name: adapter.merged(net.get_parameter(name)) for name, adapter in attached.parameters.items()}
    attached.detach()
    for name, layer in attached.layers.items():
        merged[f"{name}.weight"] = layer.merged(net.get_parameter(f"{name}.weight"), None)[0]
    net.load_state_dict(merged, strict=False)
    close(logits(net), logits(theirs))


def test_a_method_that_peft_has_for_layers_only_is_refused() -> None:
    net = make_tiny("glm4_moe")
    with pytest.raises(
        RecipeError, match=r"gate_proj' and 1 more as fused experts, which dora does not .* method: lora"
    ):
        find_targets(net, DoraSettings(r=4, target_modules=["q_proj", "gate_proj"]), head_name="lm_head")
    assert find_targets(net, DoraSettings(r=4, target_modules=["q_proj"]), head_name="lm_head")


def test_all_linear_leaves_gates_of_one_row_out() -> None:
    names = {target.name for target in find_targets(make_tiny("qwen2_moe"), LoraSettings(), head_name="lm_head")}
    assert names
    assert not any(name.endswith("shared_expert_gate") for name in names)
