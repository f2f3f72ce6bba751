"""The adapter contract for methods that train the base's own vectors: norms and biases, also of a quantized base."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from tests.support.loop_case import check_four_steps
from tests.support.peft_case import BASES, Base, logits_of, merged_net, move_from_start
from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.adapters.folder.read import attach_adapter_folder, save_adapter_folder
from tunekit.errors import AdapterError
from tunekit.model.call import Call, calling
from tunekit.model.quantized.weights import pack_linear
from tunekit.recipe.adapters.bitfit import BitfitSettings
from tunekit.recipe.adapters.ln_tuning import LnTuningSettings
from tunekit.recipe.training import TrainingSection

SETTINGS = {"bitfit": BitfitSettings(), "ln_tuning": LnTuningSettings()}
STORAGES = ("none", "bfloat16", "nf4", "int8_weight_only", "int8")
BERT = BASES["bert"]
every = pytest.mark.parametrize(("method", "storage"), [(m, s) for m in SETTINGS for s in STORAGES])


def make_base(storage: str) -> nn.Module:
    net = BERT.make()
    if storage == "bfloat16":
        return net.to(torch.bfloat16)
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Linear) and storage != "none" and "classifier" not in name:
            parent, _, own = name.rpartition(".")
            setattr(net.get_submodule(parent), own, pack_linear(module, storage, False, torch.float32).eval())
    return net


def attach(net: nn.Module, method: str) -> AttachedAdapter:
    return attach_adapter(net, SETTINGS[method], seed=0, head_name=None)


@every
def test_contract(method: str, storage: str, tmp_path: Path) -> None:
    net = make_base(storage)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    plain = logits_of(net, BERT)
    attached = attach(net, method)
    assert torch.equal(logits_of(net, BERT), plain)
    trained = attached.trained()
    assert not any(decays for _, _, decays in attached.groups(TrainingSection()))
    assert all(name.endswith("bias") or "LayerNorm" in name for name in trained)
    assert any("LayerNorm" in name for name in trained)
    assert (method == "bitfit") == any("query.bias" in name for name in trained)
    move_from_start(trained.values(), 0.2)
    changed = logits_of(net, BERT)
    assert (changed - plain).abs().max() > 1e-3
    with calling(Call(bypassed=True)):
        assert torch.equal(logits_of(net, BERT), plain)
    changed.float().square().sum().backward()
    assert {id(p) for p in net.parameters() if p.requires_grad} == {id(p) for p in trained.values()}
    assert all(p.dtype == torch.float32 and p.grad is not None for p in trained.values())
    save_adapter_folder(attached, tmp_path / "a", base_name="org/base", base_fingerprint=None, revision=None)
    other = make_base(storage)
    read = attach_adapter_folder(other, tmp_path / "a", head_name=None)
    assert all(torch.equal(read.state()[name], tensor) for name, tensor in attached.state().items())
    assert torch.equal(logits_of(other, BERT), changed)
    attached.detach()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("method", SETTINGS)
def test_merged_is_the_running_adapter(method: str) -> None:
    attached = attach(BERT.make(), method)
    move_from_start(attached.trained().values(), 0.2)
    assert torch.equal(logits_of(merged_net(attached, BERT), BERT), logits_of(attached.net, BERT))


def test_a_base_without_biases_is_refused_and_a_wrong_name_told() -> None:
    base: Base = BASES["llama"]
    with pytest.raises(AdapterError, match=r"'all-biases' matches no bias of the base"):
        attach(base.make(), "bitfit")
    with pytest.raises(AdapterError, match=r"'layernrom' matches no norm of the base.*input_layernorm"):
        attach_adapter(base.make(), LnTuningSettings(target_modules=("layernrom",)), seed=0, head_name=None)


@pytest.fixture
def biased_llama(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny llama with biases of its attention layers."""
    folder = tmp_path / "biased"
    shutil.copytree(tiny_llama, folder)
    LlamaForCausalLM.from_pretrained(tiny_llama, attention_bias=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", SETTINGS)
def test_four_steps(method: str, biased_llama: Path) -> None:
    check_four_steps(biased_llama, SETTINGS[method])
