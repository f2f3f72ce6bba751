"""What every start keeps: the base untouched, bypass and start equal to it, and an export that peft reads the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from tests.support.peft_case import BASES, close, move_from_start
from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.adapters.folder.read import attach_adapter_folder, save_adapter_folder
from tunekit.adapters.starts.start import LayerActivations, initialise_all, start_module
from tunekit.model.call import Call, calling
from tunekit.model.quantized.weights import weight_of
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.reading.names import known_names, settings_class

FAMILIES = ("llama", "gpt2")
MOVING = ("pissa", "olora", "corda", "lora_ga")
METHODS = ("lora", "rslora", "dora", "lora_fa", "patterns")


def settings_of(method: str, start: str, family: str) -> Any:
    own: dict[str, Any] = {"r": 4, "alpha": 6.0, "start": start}
    last = BASES[family].feedforward[0]
    if method == "rslora":
        own |= {"use_rslora": True}
    if method == "patterns":
        own |= {"rank_pattern": {last: 6}, "alpha_pattern": {last: 5.0}, "bias": "all"}
    name = "lora" if method in ("rslora", "patterns") else method
    make: Any = settings_class("adapters", name)
    return make(target_modules=(*BASES[family].attention, last), **own)


def attach(family: str, settings: Any) -> AttachedAdapter:
    """With random inputs and gradients in place of those that a calibrated start looks at."""
    adapter = attach_adapter(BASES[family].make(), settings, seed=1, head_name=BASES[family].head_name)
    if settings.start.looks_at not in ("inputs", "gradients"):
        return adapter
    evidence, generator = {}, torch.Generator().manual_seed(3)
    for target in adapter.targets:
        statistics = start_module(settings.start.method).STATISTICS(settings.start, target)
        x = torch.randn(60, target.in_features, generator=generator)
        gradients = torch.randn(60, target.out_features, generator=generator) * 0.01
        statistics.add(LayerActivations(x, torch.arange(60) // 20, torch.ones(60, dtype=torch.bool), gradients))
        evidence[target.name] = statistics.finish()
    initialise_all(adapter.layers, 1, evidence.get)
    return adapter


def logits(net: nn.Module, family: str) -> Tensor:
    found: Tensor = net(**BASES[family].inputs).logits
    return found


@pytest.mark.sampled(32)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", [name for name in known_names("starts") if name != "loftq"])
@pytest.mark.parametrize("method", METHODS)
def test_the_start_is_the_base_and_the_base_stays(method: str, start: str, family: str) -> None:
    net = BASES[family].make()
    before, plain = {name: tensor.clone() for name, tensor in net.state_dict().items()}, logits(net, family)
    adapter = attach(family, settings_of(method, start, family))
    exactly = start != "orthogonal" and method != "dora"  # there up to rounding
    torch.testing.assert_close(logits(adapter.net, family), plain, rtol=0, atol=0 if exactly else 1e-5)
    move_from_start(adapter.trained().values(), 0.1)
    assert (logits(adapter.net, family) - plain).abs().max() > 1e-2
    with calling(Call(bypassed=True)):
        assert torch.equal(logits(adapter.net, family), plain)
    adapter.detach()
    after = adapter.net.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("start", MOVING)
def test_residual_and_start_are_the_original(start: str) -> None:
    """A and B hold a part of W that is not small, and W less that part is what stays frozen."""
    adapter = attach("llama", settings_of("lora", start, "llama"))
    generator = torch.Generator().manual_seed(7)
    for layer in adapter.layers.values():
        weight = weight_of(layer.base_layer)
        assert weight is not None
        moved = layer.scaling * layer.B.detach() @ layer.A.detach()
        assert moved.norm() > 0.05 * weight.read().norm()
        residual = weight.read() - moved
        with torch.no_grad():
            layer.A.add_(torch.randn(layer.A.shape, generator=generator) * 0.1)
            layer.B.add_(torch.randn(layer.B.shape, generator=generator) * 0.1)
        expected = residual + layer.scaling * layer.B.detach() @ layer.A.detach()
        close(layer.merged(weight.read(), None)[0], expected)


@pytest.mark.parametrize("start", MOVING)
def test_gradients_are_those_of_a_base_without_the_part(start: str) -> None:
    """y = (W - s B' A') x + s B A x has the same gradients of A and B."""
    layer = attach("llama", settings_of("lora", start, "llama")).layers["model.layers.0.self_attn.q_proj"]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        layer.A.add_(0.1)
    layer(x).square().sum().backward()
    a, b = layer.A.detach().clone().requires_grad_(), layer.B.detach().clone().requires_grad_()
    weight = weight_of(layer.base_layer)
    assert weight is not None
    residual = weight.read() - layer.scaling * layer.start_B @ layer.start_A
    (x @ (residual + layer.scaling * b @ a).t()).square().sum().backward()
    for mine, other in ((layer.A.grad, a.grad), (layer.B.grad, b.grad)):
        assert mine is not None
        assert other is not None
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.sampled(16)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", MOVING)
@pytest.mark.parametrize("method", METHODS)
def test_the_export_is_plain_lora_that_peft_reads(method: str, start: str, family: str, tmp_path: Path) -> None:
    adapter, base = attach(family, settings_of(method, start, family)), BASES[family]
    move_from_start(adapter.trained().values(), 0.1)
    native = {name: tensor.clone() for name, tensor in adapter.state().items()}
    folder = tmp_path / "adapter"
    save_adapter_folder(
        adapter, folder, base_name="org/base", base_fingerprint=None, revision=None, task_type=base.task_type
    )
    assert all(torch.equal(tensor, native[name]) for name, tensor in adapter.state().items())
    config = peft.PeftConfig.from_pretrained(str(folder))
    assert (config.r, config.init_lora_weights) == (8, True)
    running = logits(adapter.net, family)
    close(logits(peft.PeftModel.from_pretrained(base.make(), str(folder)).eval(), family), running)
    read = attach_adapter_folder(base.make(), folder, head_name=base.head_name)
    close(logits(read.net, family), running)
    scalings = {name: layer.scaling for name, layer in adapter.layers.items()}
    assert scalings == pytest.approx({name: layer.scaling for name, layer in read.layers.items()})


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_twice_the_rank_is_never_more_than_the_matrix_has(start: str, tmp_path: Path) -> None:
    """k_proj is 16 x 32: its plain form has rank 16 where r is 12."""
    targets = ("q_proj", "k_proj", "down_proj")
    settings = LoraSettings(r=12, alpha=6.0, target_modules=targets, start=start)
    adapter = attach("llama", settings)
    move_from_start(adapter.trained().values(), 0.1)
    save_adapter_folder(adapter, tmp_path / "a", base_name="org/base", base_fingerprint=None, revision=None)
    read = attach_adapter_folder(BASES["llama"].make(), tmp_path / "a", head_name="lm_head")
    assert {target.name.rpartition(".")[2]: target.r for target in read.targets} == {
        "q_proj": 24,
        "k_proj": 16,
        "down_proj": 24,
    }
    close(logits(read.net, "llama"), logits(adapter.net, "llama"))
    theirs = peft.PeftModel.from_pretrained(BASES["llama"].make(), str(tmp_path / "a")).eval()
    close(logits(theirs, "llama"), logits(adapter.net, "llama"))


def test_nothing_cancels_in_low_precision() -> None:
    """A small step from a large start, multiplied in bfloat16, is as exact as one from nothing."""
    adapter = attach("llama", settings_of("lora", "pissa", "llama"))
    layer = adapter.layers["model.layers.0.mlp.down_proj"]
    with torch.no_grad():
        layer.A.mul_(1.001)
    x = torch.randn(200, 48, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = x.double() @ layer.delta().double().t()
    found = layer.update(x).double()
    assert (found - exact).norm() < 0.01 * exact.norm()
