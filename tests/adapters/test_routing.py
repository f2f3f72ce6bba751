"""Rows of several adapters in one forward: each as in a forward of its adapter alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.adapters.test_several import maker
from tests.support.peft_case import BASES, move_from_start
from tunekit.adapters.attach import attach_adapter
from tunekit.adapters.several import AdapterSet, Switch
from tunekit.errors import TunekitError
from tunekit.model.call import Call, calling
from tunekit.recipe.adapters.dora import DoraSettings
from tunekit.recipe.adapters.ia3 import Ia3Settings
from tunekit.recipe.adapters.ln_tuning import LnTuningSettings
from tunekit.recipe.adapters.loha import LohaSettings
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.adapters.prefix import PrefixSettings
from tunekit.recipe.adapters.vera import VeraSettings

LAYERS = ("q_proj", "down_proj")
ADAPTERS: dict[str, Any] = {
    "qv": LoraSettings(r=4, alpha=3, target_modules=("q_proj", "v_proj")),
    "all": LoraSettings(r=2, target_modules="all-linear"),
    "rs": LoraSettings(r=7, alpha=2, use_rslora=True, target_modules="all-linear"),
    "mixed": LoraSettings(r=3, target_modules=LAYERS, rank_pattern={"q_proj": 9}, alpha_pattern={"q_proj": 5}),
    "biased": LoraSettings(r=3, target_modules=("up_proj",), lora_bias=True),
    "dora": DoraSettings(r=3, target_modules=LAYERS, modules_to_save=("lm_head",)),
    "ia3": Ia3Settings(target_modules=("k_proj", "down_proj"), feedforward_modules=("down_proj",)),
    "vera": VeraSettings(r=4, target_modules=("q_proj", "o_proj")),
    "loha": LohaSettings(r=2, target_modules=LAYERS),
    "norms": LnTuningSettings(),
    "tokens": LoraSettings(r=2, target_modules=("embed_tokens",), trainable_token_indices={"lm_head": (5, 9)}),
}
# Short and long segments, in any order, some in several places; with the base's rows.
ROWS = {
    "one each": ("all", "rs"),
    "two each": ("all", "all", "rs", "rs"),
    "padded": ("rs", "all", "mixed", "all", "qv", "all", None),
    "with long ones": ("all", "qv", "all", None, "all", "rs", "all", "all", "biased"),
    "methods": ("dora", "all", "ia3", None, "vera", "norms", "loha", "rs", "tokens", "dora", "qv"),
    "no base": ("dora", "ia3", "dora"),
}


def load(net: nn.Module, settings: Any, seed: int = 1) -> Any:
    attached = attach_adapter(net, settings, seed=seed, head_name="lm_head")
    move_from_start(attached.trained().values(), 0.2)
    return attached


def loaded() -> tuple[Any, AdapterSet]:
    """A base with all adapters."""
    net = BASES["llama"].make()
    several = AdapterSet(net)
    for name, settings in ADAPTERS.items():
        several.add(name, lambda settings=settings: load(net, settings))
    return net, several


@cache
def of_module() -> tuple[Any, AdapterSet]:
    return loaded()


def ids(rows: int, tokens: int) -> Tensor:
    return torch.arange(3, 3 + rows * tokens).reshape(rows, tokens) % 97


def logits(net: Any, inputs: Tensor) -> Tensor:
    output: Tensor = net(input_ids=inputs, use_cache=False).logits
    return output


def one_by_one(net: Any, several: AdapterSet, names: tuple[str | None, ...], inputs: Tensor) -> Tensor:
    """The test's oracle: a forward for each row, with its adapter alone."""
    rows = []
    for name, row in zip(names, inputs, strict=True):
        several.switch(name)
        rows.append(logits(net, row[None]))
    several.switch(None)
    return torch.cat(rows)


@pytest.mark.parametrize("tokens", [1, 2, 12])
@pytest.mark.parametrize("rows", ROWS)
@torch.no_grad()
def test_each_row_is_as_with_its_adapter_alone(rows: str, tokens: int) -> None:
    (net, several), names = of_module(), ROWS[rows]
    inputs = ids(len(names), tokens)
    expected = one_by_one(net, several, names, inputs)
    with several.using_rows(names):
        joined = logits(net, inputs)
        torch.testing.assert_close(logits(net, inputs), joined, rtol=0, atol=0)
        with calling(Call(bypassed=True, adapter_of_row=names)):
            base = logits(net, inputs)
    torch.testing.assert_close(joined, expected, rtol=0, atol=1e-4)
    assert torch.equal(base, logits(net, inputs))
    for name, one, plain in zip(names, joined, base, strict=True):
        assert bool((one - plain).abs().max() > 1e-3) == (name is not None)


@torch.no_grad()
def test_rows_join_and_leave_in_any_order() -> None:
    """The copies of factors are reused where an adapter stays in its place, and grow with number and rank."""
    net, several = of_module()
    for names in (("all",) * 2, ("all", "qv"), ("qv", "all", "rs"), ("mixed",), ("qv", None, "rs", "mixed", "all"), ()):
        inputs = ids(len(names), 1)
        if names:
            expected = one_by_one(net, several, names, inputs)
            with several.using_rows(names):
                torch.testing.assert_close(logits(net, inputs), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_copies_of_factors_are_freed_when_their_adapters_leave() -> None:
    net, several = loaded()
    names, inputs = ("all", "rs", "mixed", "qv"), ids(4, 1)
    expected = one_by_one(net, several, names, inputs)
    sizes = []
    for staying in (names, ("all", "rs"), ("rs",), ()):
        with several.using_rows(names):
            torch.testing.assert_close(logits(net, inputs), expected, rtol=0, atol=1e-4)
        several.keep_copies(staying)
        sizes.append(several.copies.used_bytes)
    assert sizes[0] > sizes[1] >= sizes[2] > sizes[3] == 0
    with several.using_rows(names):
        torch.testing.assert_close(logits(net, inputs), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_base_is_multiplied_once_for_all_rows() -> None:
    net, several = of_module()
    shapes: list[tuple[str, int]] = []

    def note(name: str) -> Any:
        return lambda module, inputs, output: shapes.append((name, len(output)))

    modules = ((name, net.model.layers[0].get_submodule(name)) for name in ("self_attn.q_proj", "mlp.up_proj"))
    hooks = [module.base_layer.register_forward_hook(note(name)) for name, module in modules]
    names = ("all", "dora", "rs", None, "dora", "qv")
    with several.using_rows(names):
        logits(net, ids(len(names), 1))
    for hook in hooks:
        hook.remove()
    assert sorted(shapes) == [("mlp.up_proj", 6), ("self_attn.q_proj", 2), ("self_attn.q_proj", 4)]


@torch.no_grad()
def test_a_new_adapter_under_an_old_name_is_not_the_old_one() -> None:
    net, several = loaded()
    names, inputs = ("all", "rs"), ids(2, 1)
    with several.using_rows(names):
        before = logits(net, inputs)
    several.remove("all")
    with pytest.raises(TunekitError, match="no adapter 'all' is loaded"), several.using_rows(names):
        pass
    several.add("all", lambda: load(net, ADAPTERS["all"], seed=2))
    expected = one_by_one(net, several, names, inputs)
    with several.using_rows(names):
        joined = logits(net, inputs)
    torch.testing.assert_close(joined, expected, rtol=0, atol=1e-4)
    assert (joined[0] - before[0]).abs().max() > 1e-3


@pytest.mark.parametrize("tokens", [1, 12])
def test_gradients_are_those_of_each_adapter_alone(tokens: int) -> None:
    net, several = loaded()
    names = ("all", "rs", "dora", "qv", "rs", "loha", None)
    inputs = ids(len(names), tokens)
    weights = torch.linspace(-1, 1, 97)

    def take_gradients() -> dict[str, Tensor]:
        gradients = {
            f"{name} {key}": tensor.grad.clone()
            for name in set(names) - {None}
            for key, tensor in several.adapters[str(name)].trained().items()
            if tensor.grad is not None
        }
        net.zero_grad()
        return gradients

    (one_by_one(net, several, names, inputs) * weights).sum().backward()
    expected = take_gradients()
    with several.using_rows(names):
        (logits(net, inputs) * weights).sum().backward()
    joined = take_gradients()
    assert joined.keys() == expected.keys()
    for key, gradient in joined.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-4, msg=key)


def test_adapters_that_cannot_share_a_forward_are_refused() -> None:
    """Prompts change all rows; layers of experts get tokens without their rows."""
    net, several = loaded()
    several.add("prefix", lambda: load(net, PrefixSettings(num_virtual_tokens=3, init="random")))
    assert not several.shares_forwards("prefix")
    with pytest.raises(TunekitError, match="'prefix' cannot share a forward"), several.using_rows(("all", "prefix")):
        pass
    with several.using("prefix"), calling(Call(adapter_of_row=("all",))), pytest.raises(TunekitError, match="hooks"):
        logits(net, ids(1, 3))
    with several.using_rows(("all", "rs")), pytest.raises(TunekitError, match=r"2 rows, but .* has 3 rows"):
        logits(net, ids(3, 3))
    whole = LoraSettings(r=2, target_modules=("down_proj",), modules_to_save=("self_attn",))
    other = AdapterSet(plain := BASES["llama"].make())
    other.add("whole", lambda: load(plain, whole))
    assert not other.shares_forwards("whole")
    experts = BASES["mixtral"].make()
    mixed = AdapterSet(experts)
    for name, expected in (("a", False), ("b", True)):
        mixed.add(name, maker(experts, "mixtral", name))
        assert mixed.shares_forwards(name) == expected


@torch.no_grad()
def test_one_name_leaves_no_trace_of_rows() -> None:
    net, several = loaded()
    several.switch("all")
    inputs = ids(2, 3)
    before = logits(net, inputs)
    with several.using_rows(("rs", "dora")):
        logits(net, inputs)
    assert torch.equal(logits(net, inputs), before)
    several.detach()
    assert not any(isinstance(module, Switch) or module._forward_pre_hooks for module in net.modules())
