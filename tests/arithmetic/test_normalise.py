"""Adapters as plain low-rank pairs, against the weights that PEFT computes itself in float64."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.arithmetic.test_merge import logits_of, merge, merged_logits, prepared, write_base
from tests.support.peft_case import HARMLESS_WARNINGS
from tunekit.adapter import convert_verb
from tunekit.arithmetic.nearest_lora import NotLowRank
from tunekit.arithmetic.normalise import PlainAdapter, find_plain_target, normalise, write_plain
from tunekit.errors import AdapterError
from tunekit.merge import merge_verb
from tunekit.records import with_article

peft = pytest.importorskip("peft")
EXACT = 1e-6
TIED = {"tie_word_embeddings": True}


def by_peft(folder: Path, model_type: str, base: dict[str, Any] | None = None, **values: Any) -> nn.Module:
    """PEFT's model with random trained weights, saved with its base in the folders base/ and adapter/."""
    write_base(folder / "base", model_type, **(base or {}))
    net = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], **values}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(net, peft.LoraConfig(**fields, task_type="CAUSAL_LM")).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        theirs.save_pretrained(folder / "adapter")
    return theirs


def changes_by_peft(theirs: nn.Module, base: Path) -> dict[str, Tensor]:
    """The change of each adapted matrix as stored, float64."""
    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    changes = {}
    for name, module in theirs.double().named_modules():
        if hasattr(module, "get_delta_weight"):
            name = name.removeprefix("base_model.model.")
            before = original.get_submodule(name).weight.double()
            changes[name] = module.base_layer.weight + module.get_delta_weight("default") - before
    return changes


def check_pairs(plain: PlainAdapter, changes: dict[str, Tensor]) -> None:
    assert plain.pairs.keys() == changes.keys()
    for name, pair in plain.pairs.items():
        dense = pair.b.double() @ pair.a.double()
        transposed = pair.embedding or plain.conv1d
        assert pair.scaling == 1
        assert changes[name].abs().max() > 1e-3
        assert ((dense.t() if transposed else dense) - changes[name]).abs().max() < EXACT


def plain_of(folder: Path, rank: int | None = None) -> PlainAdapter:
    return normalise(find_plain_target(str(folder / "adapter"), None, ["model.dtype=float32"]), rank)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True, "lora_alpha": 5}),
    "patterns": ("qwen2", {"rank_pattern": {"v_proj": 3, "layers.1.mlp.down_proj": 7}, "alpha_pattern": {"q_proj": 1}}),
    "rslora and patterns": (
        "llama",
        {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 9}},
    ),
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "olora": ("qwen2", {"init_lora_weights": "olora", "use_rslora": True}),
    "embedding": ("qwen2", {"target_modules": ["embed_tokens", "k_proj"]}),
    "tied embedding": ("llama", {"target_modules": ["embed_tokens", "k_proj"], "base": TIED}),
    "tied head": ("llama", {"target_modules": ["lm_head", "k_proj"], "base": TIED}),
    "head": ("llama", {"target_modules": ["lm_head"]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
    "saved head": ("llama", {"modules_to_save": ["lm_head"], "lora_alpha": 3}),
}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", CASES)
def test_pairs_are_the_changes_that_peft_makes(name: str, tmp_path: Path) -> None:
    model_type, values = CASES[name]
    theirs = by_peft(tmp_path, model_type, **values)
    expected = logits_of(theirs)
    plain = plain_of(tmp_path)
    target = find_plain_target(str(tmp_path / "adapter"), None, ["model.dtype=float32"])
    saved = theirs.base_model.model.lm_head.modules_to_save["default"].weight if name == "saved head" else None
    check_pairs(plain, changes_by_peft(theirs, tmp_path / "base"))
    assert plain.tied_pairs == {"tied embedding": ["model.embed_tokens"], "tied head": ["lm_head"]}.get(name, [])
    if saved is not None:
        assert plain.rest.keys() == {"base_model.model.lm_head.weight"}
        assert torch.equal(plain.rest["base_model.model.lm_head.weight"].double(), saved)
        return
    assert not plain.rest
    write_plain(tmp_path / "new", target, plain)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(base, str(tmp_path / "new")).eval()
    torch.testing.assert_close(logits_of(again), expected, rtol=0, atol=2e-5)
    fields = again.peft_config["default"]
    assert (fields.r, fields.lora_alpha, fields.use_rslora) == (plain.rank, plain.rank, False)
    assert (fields.rank_pattern, fields.alpha_pattern, fields.init_lora_weights) == ({}, {}, True)


def test_an_adapter_that_starts_as_pissa_can_be_merged(tmp_path: Path) -> None:
    expected = logits_of(by_peft(tmp_path, "llama", init_lora_weights="pissa"))
    merge_verb(str(tmp_path / "adapter"), str(tmp_path / "merged"), None, None, ["model.dtype=float32"])
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), expected, rtol=0, atol=2e-5)
    by_peft(tmp_path / "random", "llama", init_lora_weights="pissa_niter_4")
    with pytest.raises(AdapterError, match="cannot be recomputed; convert it first: tunekit adapter convert"):
        merge_verb(str(tmp_path / "random" / "adapter"), str(tmp_path / "other"), None, None, [])


def test_ranks_are_padded_with_zeros(tmp_path: Path) -> None:
    by_peft(tmp_path, "llama", rank_pattern={"v_proj": 2})
    plain = plain_of(tmp_path)
    wide = plain.padded(8)
    assert {pair.rank for pair in plain.pairs.values()} == {2, 4}
    assert {pair.rank for pair in wide.pairs.values()} == {8}
    for name, pair in plain.pairs.items():
        assert torch.equal(wide.pairs[name].a[: pair.rank], pair.a)
        assert not wide.pairs[name].b[:, pair.rank :].any()


@pytest.mark.parametrize("named", [["experts.gate_up_proj", "experts.down_proj"], ["gate.weight"]])
def test_experts_are_single_modules_with_the_names_of_the_files(named: list[str], tmp_path: Path) -> None:
    """Against the merged model, which is computed from the fused parameters."""
    values = {"target_modules": ["q_proj"], "target_parameters": named, "base": {"num_local_experts": 4}}
    adapter, _ = prepared(tmp_path, "mixtral", **values)
    plain = plain_of(tmp_path)
    merge(adapter, tmp_path / "merged")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert {f"{name}.weight" for name in plain.pairs} == changed
    assert len(plain.experts) == (24 if len(named) == 2 else 0)  # 2 layers, 4 experts, 3 matrices
    for name, pair in plain.pairs.items():
        change = after[f"{name}.weight"].double() - before[f"{name}.weight"].double()
        assert (pair.b.double() @ pair.a.double() - change).abs().max() < EXACT
    write_plain(tmp_path / "written", find_plain_target(str(adapter), None, []), plain)
    written = load_file(tmp_path / "written" / "adapter_model.safetensors")
    assert len(written) == 2 * len(plain.pairs)
    for name, pair in plain.pairs.items():
        assert torch.equal(written[f"base_model.model.{name}.lora_A.weight"][: pair.rank], pair.a)


def test_other_changes_are_stated(tmp_path: Path) -> None:
    base = {"attention_bias": True}
    by_peft(tmp_path / "bias", "llama", base, bias="lora_only", target_modules=["q_proj"])
    by_peft(tmp_path / "update", "llama", base, lora_bias=True, target_modules=["q_proj"])
    by_peft(tmp_path / "tokens", "llama", trainable_token_indices=[5, 9], target_modules=["q_proj"])
    for name, ending, count in (("bias", "bias", 2), ("update", "bias", 2), ("tokens", "tokens_delta", 1)):
        plain = plain_of(tmp_path / name)
        assert len(plain.rest) == count
        assert all(key.endswith(ending) for key in plain.rest)
    changed = plain_of(tmp_path / "update").rest["base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"]
    tensors, stored = (
        load_file(tmp_path / "update/adapter/adapter_model.safetensors"),
        load_file(tmp_path / "update/base/model.safetensors"),
    )
    name = "model.layers.0.self_attn.q_proj"
    expected = stored[f"{name}.bias"] + tensors[f"base_model.model.{name}.lora_B.bias"] * 1.5
    torch.testing.assert_close(changed, expected, rtol=0, atol=EXACT)


def test_dora_is_merged_or_extracted_with_its_error(tmp_path: Path) -> None:
    theirs = by_peft(tmp_path, "llama", use_dora=True, target_modules=["q_proj"])
    assert (with_article("ia3"), with_article("dora")) == ("an ia3", "a dora")
    with pytest.raises(NotLowRank, match="a dora adapter cannot be converted to LoRA exactly; merge it"):
        plain_of(tmp_path)
    plain = plain_of(tmp_path, rank=5)
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    merged = theirs.merge_and_unload().requires_grad_(requires_grad=False)
    for name, pair in plain.pairs.items():
        delta = merged.get_submodule(name).weight - original.get_submodule(name).weight
        values = torch.linalg.svdvals(delta.detach().double())
        assert plain.losses[name].error == pytest.approx(float(values[5:].square().sum().sqrt()), rel=1e-3)
        assert pair.rank == 5


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": ["embed_tokens", "k_proj"], "ensure_weight_tying": True, "base": TIED},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, "base": TIED},
        {"modules_to_save": ["norm"]},  # PEFT also copies input_layernorm, which ends with norm
    ],
)
def test_modules_that_peft_adds_are_converted_too(values: dict[str, Any], tmp_path: Path) -> None:
    expected = logits_of(by_peft(tmp_path, "llama", **values))
    convert_verb(str(tmp_path / "adapter"), None, None, None, str(tmp_path / "new"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=f".*({'|'.join(HARMLESS_WARNINGS)})")
        again = peft.PeftModel.from_pretrained(base, str(tmp_path / "new")).eval()
    torch.testing.assert_close(logits_of(again), expected, rtol=0, atol=2e-5)


def test_trained_biases_of_updates_are_refused_by_name(tmp_path: Path) -> None:
    by_peft(tmp_path, "llama", lora_bias=True)
    with pytest.raises(AdapterError, match=r"lora_bias: the adapter has a bias in each update.*; merge it instead"):
        convert_verb(str(tmp_path / "adapter"), None, None, None, str(tmp_path / "new"))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_tied_partners_are_those_of_peft(model_type: str, tmp_path: Path) -> None:
    """PEFT ties the head to a regular expression that matches embed_tokens, but not to GPT-2's wte."""
    targets: Any = r".*(embed_tokens|q_proj)" if model_type == "llama" else ["wte", "c_attn"]
    expected = logits_of(by_peft(tmp_path, model_type, TIED, target_modules=targets, ensure_weight_tying=True))
    merge_verb(str(tmp_path / "adapter"), str(tmp_path / "merged"), None, None, [])
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_moved_head_is_not_written(start: str, tmp_path: Path) -> None:
    """PEFT's file of an adapted head contains the weight without the part that PiSSA moved into the adapter."""
    expected = logits_of(by_peft(tmp_path, "llama", init_lora_weights=start, target_modules=["lm_head"]))
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    convert_verb(str(tmp_path / "adapter"), None, None, None, str(tmp_path / "new"))
    merge_verb(str(tmp_path / "adapter"), str(tmp_path / "merged"), None, None, [])
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    again = logits_of(peft.PeftModel.from_pretrained(net, str(tmp_path / "new")).eval())
    for logits in (again, merged_logits(tmp_path / "merged")):
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    by_peft(tmp_path / "tied", "llama", TIED, init_lora_weights=start, target_modules=["lm_head"])
    with pytest.raises(AdapterError, match="'lm_head' also moved the embedding that it is tied to"):
        convert_verb(str(tmp_path / "tied" / "adapter"), None, None, None, str(tmp_path / "other"))


def test_biases_that_peft_repeats_are_read(tmp_path: Path) -> None:
    """With bias: all, PEFT also saves the biases of a copied module, and those that the copy replaces."""
    base = {"ffn_dim": 96, "word_embed_proj_dim": 64}
    values = {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["final_layer_norm"]}
    expected = logits_of(by_peft(tmp_path, "opt", base, **values))
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.model.decoder.final_layer_norm.original_module.bias" in keys
    merge_verb(str(tmp_path / "adapter"), str(tmp_path / "merged"), None, None, [])
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), expected, rtol=0, atol=2e-5)
