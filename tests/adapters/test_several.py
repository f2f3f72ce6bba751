"""Several adapters over one base: each as it is alone, switched back and forth, bypassed, taken out."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.peft_case import BASES, IDS, move_from_start
from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.adapters.several import AdapterSet, Switch
from tunekit.errors import TunekitError
from tunekit.model.call import Call, calling
from tunekit.recipe.adapters.bitfit import BitfitSettings
from tunekit.recipe.adapters.dora import DoraSettings
from tunekit.recipe.adapters.ia3 import Ia3Settings
from tunekit.recipe.adapters.ln_tuning import LnTuningSettings
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.adapters.prefix import PrefixSettings
from tunekit.recipe.adapters.prompt import PromptSettings
from tunekit.recipe.adapters.vera import VeraSettings

Case = tuple[str, nn.Module, AdapterSet, dict[str, Tensor]]
ADAPTERS: dict[str, dict[str, Any]] = {
    "llama": {
        "a.1": LoraSettings(r=4, target_modules=("q_proj", "v_proj")),
        "b": LoraSettings(r=2, target_modules="all-linear"),
        "c": DoraSettings(r=3, target_modules=("q_proj", "down_proj"), modules_to_save=("lm_head",)),
        "d": Ia3Settings(target_modules=("k_proj", "down_proj"), feedforward_modules=("down_proj",)),
        "e": VeraSettings(r=4, target_modules=("q_proj", "o_proj")),
        "f": LnTuningSettings(),
        "g": LoraSettings(r=2, target_modules=("embed_tokens",), trainable_token_indices={"lm_head": (5, 9)}),
        "h": PrefixSettings(num_virtual_tokens=3, init="random"),
        "i": PromptSettings(num_virtual_tokens=3),
    },
    "gpt2": {
        "a": LoraSettings(r=4, target_modules=("c_attn",), bias="all"),
        "b": BitfitSettings(),
        "c": PrefixSettings(num_virtual_tokens=2, init="random"),
    },
    "mixtral": {
        "a": LoraSettings(r=2, target_modules=("q_proj",), target_parameters=("gate_up_proj",)),
        "b": LoraSettings(r=3, target_modules=("q_proj", "o_proj")),
    },
}


def make(net: nn.Module, family: str, name: str) -> AttachedAdapter:
    attached = attach_adapter(net, ADAPTERS[family][name], seed=1, head_name="lm_head")
    move_from_start(attached.trained().values(), 0.2)
    return attached


def logits(net: Any, attached: AttachedAdapter | None = None) -> Tensor:
    """As TunedModel.own_logits has them."""
    inputs = {"input_ids": IDS}
    found: Tensor = net(**(inputs if attached is None else attached.inputs(inputs)), use_cache=False).logits.detach()
    return found if attached is None else attached.outputs(found)


@pytest.fixture(params=ADAPTERS, name="case")
def _case(request: pytest.FixtureRequest) -> Case:
    """A base with all its adapters loaded, and the logits of each one alone."""
    net = BASES[request.param].make()
    several = AdapterSet(net)
    for name in ADAPTERS[request.param]:
        several.add(name, maker(net, request.param, name))
    return request.param, net, several, alone_logits(request.param)


@cache
def alone_logits(family: str) -> dict[str, Tensor]:
    """Of the base (under "") and of each adapter alone."""
    alone = {"": logits(BASES[family].make())}
    for name in ADAPTERS[family]:
        net = BASES[family].make()
        alone[name] = logits(net, make(net, family, name))
        assert (alone[name] - alone[""]).abs().max() > 1e-3
    return alone


def maker(net: nn.Module, family: str, name: str) -> Callable[[], AttachedAdapter]:
    return lambda: make(net, family, name)


def test_each_is_what_it_is_alone_in_any_order(case: Case) -> None:
    _, net, several, alone = case
    first: dict[str, Tensor] = {}
    for name in several.adapters:
        with several.using(name) as attached:
            first[name] = logits(net, attached)
        torch.testing.assert_close(first[name], alone[name], rtol=0, atol=1e-5)
    for name in [*reversed(several.adapters), *several.adapters]:
        with several.using(name) as attached:
            assert torch.equal(logits(net, attached), first[name])
            with calling(Call(bypassed=True)):
                assert torch.equal(logits(net, attached), alone[""])
        assert torch.equal(logits(net), alone[""])  # nothing is switched to


def test_a_switch_holds_until_the_next(case: Case) -> None:
    _, net, several, alone = case
    for name in several.adapters:
        several.switch(name)
        switched = logits(net, several.adapters[name])
        torch.testing.assert_close(switched, alone[name], rtol=0, atol=1e-5)
        for other in several.adapters:
            with several.using(other) as attached:
                torch.testing.assert_close(logits(net, attached), alone[other], rtol=0, atol=1e-5)
        assert torch.equal(logits(net, several.adapters[name]), switched)
    several.switch(None)
    assert torch.equal(logits(net), alone[""])


def test_what_is_taken_out_leaves_no_trace(case: Case) -> None:
    family, net, several, alone = case
    modules = [(name, id(module)) for name, module in BASES[family].make().named_modules()]
    last = list(several.adapters)[-1]
    several.switch(last)
    several.remove(last)
    assert torch.equal(logits(net), alone[""])
    with pytest.raises(TunekitError, match=f"no adapter '{last}' is loaded; loaded: "):
        several.switch(last)
    several.add(last, maker(net, family, last))
    with several.using(last) as attached:
        torch.testing.assert_close(logits(net, attached), alone[last], rtol=0, atol=1e-5)
    several.detach()
    assert [name for name, _ in net.named_modules()] == [name for name, _ in modules]
    assert not any(isinstance(module, Switch) or module._forward_pre_hooks for module in net.modules())
    assert torch.equal(logits(net), alone[""])


def test_a_call_may_name_the_adapter_itself() -> None:
    net = BASES["llama"].make()
    several = AdapterSet(net)
    for name in ("a.1", "c", "h"):
        several.add(name, maker(net, "llama", name))
    plain = logits(net)
    several.switch("c")
    switched = logits(net)
    with calling(Call(adapter="a.1")):
        named = logits(net)
    with several.using("a.1"):
        assert torch.equal(logits(net), named)
    assert not torch.equal(named, switched)
    with calling(Call(adapter="a.1", bypassed=True)):
        assert torch.equal(logits(net), plain)
    with calling(Call(adapter="z")), pytest.raises(TunekitError, match=r"no adapter 'z' is loaded; loaded: a\.1, c, h"):
        logits(net)
    with calling(Call(adapter="h")), pytest.raises(TunekitError, match=r"inside AdapterSet\.using"):
        logits(net)
    several.switch("h")
    with calling(Call(adapter="c")), pytest.raises(TunekitError, match="the hooks in the network are for 'h'"):
        logits(net)


def test_adapters_of_the_whole_model_alone_are_guarded_too() -> None:
    net = BASES["llama"].make()
    several = AdapterSet(net)
    several.add("h", maker(net, "llama", "h"))
    with calling(Call(adapter="h")), pytest.raises(TunekitError, match=r"inside AdapterSet\.using"):
        logits(net)


def test_only_the_one_in_force_gets_a_gradient() -> None:
    net: Any = BASES["llama"].make()
    several = AdapterSet(net)
    for name in ("a.1", "b"):
        several.add(name, maker(net, "llama", name))
    for name, other in (("a.1", "b"), ("b", "a.1")):
        with several.using(name):
            net(IDS).logits.square().sum().backward()
        assert all(p.grad is not None for p in several.adapters[name].trained().values())
        assert all(p.grad is None for p in several.adapters[other].trained().values())
        net.zero_grad()
    assert all(p.grad is None for n, p in net.named_parameters() if not p.requires_grad)


def test_modes_reach_every_adapter() -> None:
    net = BASES["llama"].make()
    several = AdapterSet(net)
    for name in ("a.1", "c"):
        several.add(name, maker(net, "llama", name))
    net.train()
    assert all(module.training for a in several.adapters.values() for module in a.layers.values())
    several.add("d", maker(net, "llama", "d"))
    assert all(module.training for module in several.adapters["d"].layers.values())
    net.eval()
    assert not any(module.training for a in several.adapters.values() for module in a.layers.values())


def test_what_cannot_be_loaded_at_once_is_refused_and_the_others_stay() -> None:
    net = BASES["llama"].make()
    several = AdapterSet(net)
    several.add("a.1", maker(net, "llama", "a.1"))
    several.switch("a.1")
    before = logits(net)
    whole = LoraSettings(r=2, target_modules=("down_proj",), modules_to_save=("self_attn",))
    words = r"one adapter fully trains 'model\.layers\.0\.self_attn', and the other one adapts '.*q_proj'"
    with pytest.raises(TunekitError, match=words):
        several.add("w", lambda: attach_adapter(net, whole, seed=0, head_name="lm_head"))
    with pytest.raises(TunekitError, match=r"'a\.1' is loaded already"):
        several.add("a.1", maker(net, "llama", "b"))
    with pytest.raises(TunekitError, match="matches no module"):
        several.add("x", lambda: attach_adapter(net, LoraSettings(target_modules=("none",)), seed=0, head_name=None))
    assert list(several.adapters) == ["a.1"]
    assert torch.equal(logits(net), before)
