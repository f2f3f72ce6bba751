"""LoRA of fused expert weights against peft, on every way in which transformers computes experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

from tests.support.peft_case import (
    BASES,
    CHECKS,
    FAMILIES,
    HEADS,
    SIZES,
    Base,
    close,
    logits_of,
    move_from_start,
    peft_refuses,
    run_cell,
)
from tunekit.adapters.attach import attach_adapter
from tunekit.errors import RecipeError
from tunekit.recipe.adapters.lora import LoraSettings

BOTH = ("experts.gate_up_proj", "experts.down_proj")
TABLE: dict[str, dict[str, Any]] = {
    "experts": {"target_parameters": BOTH, "target_modules": ()},
    "experts-one": {"target_parameters": ("down_proj",), "target_modules": ("q_proj", "v_proj")},
    "experts-rslora": {
        "target_parameters": BOTH,
        "target_modules": ("o_proj",),
        "use_rslora": True,
        "rank_pattern": {"experts.down_proj": 2},
        "alpha_pattern": {"experts.gate_up_proj": 5.0},
    },
}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def peft_config(fields: dict[str, Any]) -> peft.LoraConfig:
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
    return peft.LoraConfig(r=3, lora_alpha=6, **plain)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", TABLE)
def test_cell(case: str, family: str, tmp_path: Path) -> None:
    fields = TABLE[case]
    if family != "mixtral":
        alone = {**fields, "target_modules": ()}
        refusal = lambda: peft.get_peft_model(BASES[family].make(), peft_config(alone))  # noqa: E731
        peft_refuses("lora", family, "it has no fused expert weights", refusal, row=f"lora-{case}")
        with pytest.raises(RecipeError, match="matches no fused parameter of the base"):
            attach_adapter(BASES[family].make(), LoraSettings(r=3, **fields), seed=0, head_name=None)
        return
    settings = LoraSettings(r=3, alpha=6.0, **fields)
    warned = ("did not match any targeted module",)  # peft's check of patterns looks at modules only, and uses them all
    cell = run_cell(settings, peft_config(fields), family, tmp_path, row=f"lora-{case}", known_warnings=warned)
    assert not cell.failures, cell.failures
    assert tuple(cell.passed) == CHECKS


def make_mixtral(implementation: str) -> nn.Module:
    torch.manual_seed(0)
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": 2, "num_local_experts": 4}
    net = MixtralForCausalLM(MixtralConfig(**SIZES, **heads)).eval()
    net.config._experts_implementation = implementation
    return net


def make_gpt_oss(implementation: str) -> nn.Module:
    """Stores its experts transposed, and adds biases to them."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": 2, "num_local_experts": 4, "head_dim": 8}
    net = GptOssForCausalLM(GptOssConfig(**SIZES, **heads, num_experts_per_tok=2)).eval()
    net.config._experts_implementation = implementation
    return net


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("make", [make_mixtral, make_gpt_oss])
def test_every_way_of_computing_experts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make: Any, implementation: str
) -> None:
    base = Base(lambda: make(implementation), "lm_head", "CAUSAL_LM", ("q_proj",), ("o_proj",), ("norm",))
    monkeypatch.setitem(BASES, "experts", base)
    fields = {"target_parameters": BOTH, "target_modules": ("q_proj",)}
    cell = run_cell(
        LoraSettings(r=3, alpha=6.0, **fields), peft_config(fields), "experts", tmp_path, row="lora-experts"
    )
    assert not cell.failures, cell.failures
    assert tuple(cell.passed) == CHECKS


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("make", [make_mixtral, make_gpt_oss])
def test_no_changed_matrix_is_made(monkeypatch: pytest.MonkeyPatch, make: Any, implementation: str) -> None:
    """W x and L (R x) one after the other, wherever transformers multiplies."""
    settings = LoraSettings(r=3, alpha=6.0, target_parameters=BOTH, target_modules=())
    ours = attach_adapter(make(implementation), settings, seed=1, head_name="lm_head")
    move_from_start(ours.trained().values(), 0.2)
    base = Base(lambda: ours.net, "lm_head", None, (), (), ())
    expected = logits_of(ours.net, base)

    def refuse(self: object) -> None:
        raise AssertionError("the whole changed matrix was made")

    monkeypatch.setattr("tunekit.adapters.expert_parameters.ChangedParameter.materialise", refuse)
    close(logits_of(ours.net, base), expected)
