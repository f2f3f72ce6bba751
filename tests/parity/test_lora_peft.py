"""LoRA against peft, both ways: logits, gradients and merged weights, from adapters that are not zero."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.adapters.folder.read import attach_adapter_folder, save_adapter_folder
from tunekit.errors import RecipeError
from tunekit.model.quantized.weights import weight_of
from tunekit.recipe.adapters.dora import DoraSettings
from tunekit.recipe.adapters.lora import LoraSettings

IDS = torch.arange(3, 27).reshape(2, 12)


def make_llama(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    return LlamaForCausalLM(config).eval()


def make_gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()


BASES = {"llama": make_llama, "tied": lambda: make_llama(tied=True), "gpt2": make_gpt2}
PATTERNS = {
    "rank_pattern": {"q_proj": 4, "layers.1.self_attn.k_proj": 2},
    "alpha_pattern": {"up_proj": 3, ".*v_proj": 20},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # name: base, fields as peft calls them
    "all-linear": ("llama", {"target_modules": "all-linear", "r": 8, "lora_alpha": 16}),
    "patterns": ("llama", {"target_modules": "all-linear", "r": 8, "lora_alpha": 16, **PATTERNS}),
    "rslora": ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 6, "lora_alpha": 9, "use_rslora": True}),
    "regex": ("llama", {"target_modules": r".*layers\.1\..*_proj", "r": 4, "exclude_modules": r".*mlp\.up_proj"}),
    "tied-head": ("tied", {"target_modules": ["lm_head", "q_proj"], "r": 4, "lora_alpha": 6}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "r": 4, "lora_alpha": 6}),
    "tied-embeddings": ("tied", {"target_modules": ["embed_tokens", "o_proj"], "r": 4, "lora_alpha": 6}),
    "dora-embeddings": (
        "llama",
        {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "r": 4, "lora_alpha": 6, "use_dora": True},
    ),
    "dora-positions": ("gpt2", {"target_modules": ["c_attn", "wpe", "wte"], "r": 4, "lora_alpha": 6, "use_dora": True}),
    "conv1d": ("gpt2", {"target_modules": "all-linear", "r": 4, "lora_alpha": 6}),
    "conv1d-positions": ("gpt2", {"target_modules": ["c_attn", "wpe", "wte", "mlp.c_proj"], "r": 4, "lora_alpha": 6}),
}
OURS = {"lora_alpha": "alpha", "lora_dropout": "dropout"}


def settings_of(fields: dict[str, Any]) -> LoraSettings | DoraSettings:
    values = {OURS.get(name, name): tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    settings = DoraSettings if values.pop("use_dora", False) else LoraSettings
    return settings(**{"alpha": 8, **values})


def randomise(parameters: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(7)
    for parameter in parameters:
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2


def logits_of(net: nn.Module) -> torch.Tensor:
    return net(input_ids=IDS).logits


def gradients_of(net: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    weights = torch.linspace(-1, 1, 97)
    (logits_of(net) * weights).sum().backward()
    return {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}


def peft_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name.removeprefix("base_model.model.")
        .replace("vector.default.weight", "vector")
        .replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def close(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


def compare_gradients(ours: AttachedAdapter, theirs: nn.Module) -> None:
    net = ours.net
    own, other = gradients_of(net, ours.trained()), gradients_of(theirs, peft_parameters(theirs))
    assert own.keys() == other.keys()
    for name, gradient in own.items():
        torch.testing.assert_close(gradient, other[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_what_tunekit_wrote(case: str, tmp_path: Path) -> None:
    base, fields = CASES[case]
    net = BASES[base]()
    plain = logits_of(net).detach()
    attached = attach_adapter(net, settings_of(fields), seed=1, head_name="lm_head")
    close(logits_of(net), plain)
    randomise(list(attached.trained().values()))
    save_adapter_folder(attached, tmp_path / "adapter", base_name="org/base", base_fingerprint="f", revision=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(BASES[base](), str(tmp_path / "adapter"), is_trainable=True)
    # What peft says of every adapter of a tied layer, and of GPT-2's Linear head beside its Conv1Ds, is no fault of
    # the file's.
    expected = ("tie_word_embeddings", "is_gradient_checkpointing", "torch.nn.Linear")
    assert [str(w.message) for w in caught if not any(text in str(w.message) for text in expected)] == []
    theirs.eval()
    assert (logits_of(net) - plain).abs().max() > 0.01
    close(logits_of(theirs), logits_of(net))
    compare_gradients(attached, theirs)


@pytest.mark.parametrize("case", CASES)
def test_tunekit_reads_what_peft_wrote(case: str, tmp_path: Path) -> None:
    base, fields = CASES[case]
    theirs = peft.get_peft_model(BASES[base](), peft.LoraConfig(task_type="CAUSAL_LM", **fields)).eval()
    randomise(list(peft_parameters(theirs).values()))
    theirs.save_pretrained(str(tmp_path))
    net = BASES[base]()
    attached = attach_adapter_folder(net, tmp_path, head_name="lm_head")
    running = logits_of(net).detach()
    close(running, logits_of(theirs))
    compare_gradients(attached, theirs)
    attached.detach()
    for name, layer in attached.layers.items():
        weight = weight_of(net.get_submodule(name))
        assert weight is not None
        weight.replace(layer.merged(weight.read(), weight.bias)[0].detach())  # unties: the partner keeps its own
    close(logits_of(net), running)


def test_a_tied_head_leaves_the_embedding_alone() -> None:
    net = make_llama(tied=True)
    embedding = net.get_submodule("model.embed_tokens")
    before = embedding.weight.clone()
    attached = attach_adapter(net, LoraSettings(target_modules=("lm_head",), r=4), seed=0, head_name="lm_head")
    randomise(list(attached.trained().values()))
    assert [target.name for target in attached.targets] == ["lm_head"]
    hidden = net.model(input_ids=IDS).last_hidden_state
    a, b = attached.trained()["lm_head.lora_A.weight"], attached.trained()["lm_head.lora_B.weight"]
    close(net.lm_head(hidden), hidden @ (before + 32 / 4 * b @ a).T)
    assert torch.equal(embedding.weight, before)
    assert net.lm_head.weight is embedding.weight


@pytest.mark.parametrize("order", [("self_attn.q_proj", "q_proj"), ("q_proj", "self_attn.q_proj")])
def test_overlapping_patterns_mean_the_same_in_peft(order: tuple[str, str], tmp_path: Path) -> None:
    values = {"self_attn.q_proj": 6, "q_proj": 2}
    ranks = {key: values[key] for key in order}
    settings = LoraSettings(r=4, rank_pattern=ranks, alpha_pattern={key: float(rank) for key, rank in ranks.items()})
    net = make_llama()
    attached = attach_adapter(net, settings, seed=1, head_name="lm_head")
    randomise(list(attached.trained().values()))
    assert {target.r for target in attached.targets if target.name.endswith("q_proj")} == {6}
    save_adapter_folder(attached, tmp_path / "a", base_name="org/base", base_fingerprint=None, revision=None)
    theirs = peft.PeftModel.from_pretrained(make_llama(), str(tmp_path / "a")).eval()
    theirs.save_pretrained(str(tmp_path / "b"))  # peft sorts the keys
    again = peft.PeftModel.from_pretrained(make_llama(), str(tmp_path / "b")).eval()
    for other in (theirs, again):
        close(logits_of(other), logits_of(net))
    read = make_llama()
    attach_adapter_folder(read, tmp_path / "b", head_name="lm_head")
    close(logits_of(read), logits_of(net))


def test_a_rank_above_the_smaller_side_is_read_but_not_made(tmp_path: Path) -> None:
    fields = {"target_modules": ["k_proj"], "r": 20, "lora_alpha": 8}  # k_proj is 16 x 32
    theirs = peft.get_peft_model(make_llama(), peft.LoraConfig(task_type="CAUSAL_LM", **fields)).eval()
    randomise(list(peft_parameters(theirs).values()))
    theirs.save_pretrained(str(tmp_path))
    net = make_llama()
    attach_adapter_folder(net, tmp_path, head_name="lm_head")
    close(logits_of(net), logits_of(theirs))
    with pytest.raises(
        RecipeError, match=r"rank 20 is too large for 'model\.layers\.0\.self_attn\.k_proj' \(16 x 32\)"
    ):
        attach_adapter(make_llama(), settings_of(fields), seed=0, head_name="lm_head")
