"""The adapter contract for methods that enter at the attention, and their folders: what is malformed is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.support.peft_case import BASES, logits_of, move_from_start
from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.adapters.folder.read import attach_adapter_folder, save_adapter_folder
from tunekit.errors import AdapterError, ModelError
from tunekit.model.call import Call, calling
from tunekit.model.quantized.weights import pack_linear
from tunekit.recipe.adapters.llama_adapter import LlamaAdapterSettings
from tunekit.recipe.adapters.prefix import PrefixSettings
from tunekit.recipe.training import TrainingSection

METHODS: dict[str, Any] = {
    "text": PrefixSettings(num_virtual_tokens=4, init_ids=(5, 6, 7)),
    "random": PrefixSettings(num_virtual_tokens=4, init="random"),
    "zero": PrefixSettings(num_virtual_tokens=4, init="zero"),
    "projection": PrefixSettings(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=12),
    "llama_adapter": LlamaAdapterSettings(adapter_len=4, adapter_layers=1),
}
IDENTITY = "llama_adapter"  # a prefix takes its share of every attention, also one of zeros
BASE = BASES["llama"]
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def make_base(storage: str) -> Any:
    net: Any = BASE.make()
    if storage == "bfloat16":
        return net.to(torch.bfloat16)
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Linear) and storage != "none" and "lm_head" not in name:
            parent, _, own = name.rpartition(".")
            setattr(net.get_submodule(parent), own, pack_linear(module, storage, False, torch.float32).eval())
    return net


def attach(net: nn.Module, method: str) -> AttachedAdapter:
    return attach_adapter(net, METHODS[method], seed=0, head_name="lm_head")


@pytest.mark.parametrize("method", METHODS)
def test_weight_decay_spares_gates_and_biases(method: str) -> None:
    groups = attach(make_base("none"), method).groups(TrainingSection(weight_decay=0.1))
    spared = {name for names, _, decays in groups if not decays for name in names}
    assert spared == {name for names, _, _ in groups for name in names if name.endswith(("bias", "gate"))}
    assert bool(spared) == (method in ("projection", "llama_adapter"))


@pytest.mark.sampled(10)
@pytest.mark.parametrize("storage", ["none", "bfloat16", "nf4", "int8_weight_only", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_contract(method: str, storage: str, tmp_path: Path) -> None:
    net = make_base(storage)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    plain = logits_of(net, BASE).detach()
    attached = attach(net, method)
    assert attached.starts_as_identity() == (method == IDENTITY)
    started = logits_of(net, BASE)
    assert torch.equal(started, plain) == (method == IDENTITY)
    trained = attached.trained()
    move_from_start(trained.values(), 0.2)
    changed = logits_of(net, BASE)
    assert (changed - plain).abs().max() > 1e-3
    with calling(Call(bypassed=True)):
        assert torch.equal(logits_of(net, BASE), plain)
    changed.float().square().sum().backward()  # type: ignore[no-untyped-call]
    assert [name for name, p in net.named_parameters() if p.requires_grad] == []
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    save_adapter_folder(attached, tmp_path / "a", base_name="org/base", base_fingerprint=None, revision=None)
    other = make_base(storage)
    read = attach_adapter_folder(other, tmp_path / "a", head_name="lm_head")
    exported = attached.file_tensors()
    assert {name: tensor.tolist() for name, tensor in read.state().items()} == {
        name: tensor.tolist() for name, tensor in exported.items()
    }
    assert torch.equal(logits_of(other, BASE), changed)
    attached.detach()
    assert torch.equal(logits_of(net, BASE), plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_first_values_depend_on_the_seed_alone(method: str) -> None:
    def values(seed: int) -> list[Tensor]:
        torch.manual_seed(seed + 5)  # the global generator has no say
        return list(attach_adapter(BASE.make(), METHODS[method], seed=seed, head_name=None).state().values())

    assert all(torch.equal(a, b) for a, b in zip(values(1), values(1), strict=True))
    drawn = method not in ("text", "zero")
    assert any(not torch.equal(a, b) for a, b in zip(values(1), values(2), strict=True)) == drawn


def test_more_layers_leave_the_upper_ones_as_they_start() -> None:
    few, many = (
        attach_adapter(BASE.make(), LlamaAdapterSettings(adapter_len=4, adapter_layers=n), seed=0, head_name=None)
        for n in (1, 2)
    )
    assert few.state().keys() < many.state().keys()
    assert all(torch.equal(tensor, many.state()[name]) for name, tensor in few.state().items())


@pytest.mark.parametrize("method", METHODS)
def test_a_meta_base_allocates_nothing(method: str) -> None:
    net: Any = BASE.make().to("meta")
    attached = attach(net, method)
    assert all(tensor.is_meta for tensor in attached.state().values())
    assert net(input_ids=torch.zeros(2, 7, dtype=torch.int64, device="meta")).logits.shape == (2, 7, 97)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("method", METHODS)
def test_every_attention_function_agrees(method: str, implementation: str) -> None:
    attached, other = attach(BASE.make(), method), make_base("none")
    other.set_attn_implementation(implementation)
    moved = attach(other, method)
    for adapter in (attached, moved):
        move_from_start(adapter.trained().values(), 0.2)
    torch.testing.assert_close(logits_of(other, BASE), logits_of(attached.net, BASE), rtol=0, atol=1e-5)


def test_a_settings_contradiction_is_told() -> None:
    for fields, text in (
        ({"prefix_projection": True, "init": "text"}, "remove init"),
        ({"encoder_hidden_size": 5}, "belongs to prefix_projection"),
        ({"init_ids": []}, "init_ids is empty"),
    ):
        with pytest.raises(ValueError, match=text):
            PrefixSettings(**fields)
    with pytest.raises(AdapterError, match="has not been tokenized"):
        attach_adapter(BASE.make(), PrefixSettings(), seed=0, head_name=None)


def test_only_attention_that_takes_a_cache_can_be_entered() -> None:
    net: Any = BASE.make()
    net.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ModelError, match=r"llama .*: it has layers with chunked_attention"):
        attach(net, "random")
    net = BASE.make()
    net.config.head_dim = 5
    with pytest.raises(ModelError, match=r"has 16 outputs, not 2 heads of width 5"):
        attach(net, "random")


def change(folder: Path, **fields: Any) -> None:
    values = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps({name: value for name, value in values.items() if value != "absent"}))


def rewrite(folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(edit(load_file(folder / TENSORS)), folder / TENSORS)


PREFIX: dict[str, tuple[Callable[[Path], None], str]] = {
    "longer": (lambda f: change(f, num_virtual_tokens=5), r"prompt_embeddings.*shape \[4, 64\], expected \[5, 64\]"),
    "huge": (lambda f: change(f, num_virtual_tokens=10**9), r"expected \[1000000000, 64\]"),
    "beyond": (lambda f: change(f, num_virtual_tokens=10**12), "num_virtual_tokens: malformed"),
    "no length": (lambda f: change(f, num_virtual_tokens="absent"), "num_virtual_tokens: malformed"),
    "layers": (lambda f: change(f, num_layers=3), "num_layers: is 3, but this base needs 2"),
    "heads": (lambda f: change(f, num_attention_heads=4), "num_attention_heads: is 4, but this base needs 2"),
    "width": (lambda f: change(f, token_dim=32), "token_dim: is 32, but this base needs 16"),
    "half a model": (lambda f: change(f, num_transformer_submodules=2), "num_transformer_submodules: is 2"),
    "text for a number": (lambda f: change(f, num_layers="2"), "num_layers: must be a whole number"),
    "start": (lambda f: change(f, init_weights="ones"), "init_weights: the field has the value ones"),
    "projection": (lambda f: change(f, prefix_projection="yes"), "prefix_projection: the field has the value yes"),
    "copies": (lambda f: change(f, modules_to_save=["lm_head"]), "modules_to_save: the field has the value"),
    "unknown": (lambda f: change(f, prefix_dropout=0.5), "prefix_dropout: the field has the value 0.5"),
    "targets": (lambda f: change(f, target_modules=["q_proj"]), "target_modules: the field has the value"),
    "encoder": (
        lambda f: rewrite(f, lambda t: {**t, "embedding.weight": torch.ones(4, 16)}),
        "is not a tensor of this",
    ),
    "empty": (lambda f: rewrite(f, lambda t: {}), "'prompt_embeddings' is missing"),
    "not finite": (lambda f: rewrite(f, lambda t: {n: x * torch.nan for n, x in t.items()}), "contains NaN"),
}
GATE = "base_model.model.model.layers.1.self_attn.adaption_gate"
LLAMA: dict[str, tuple[Callable[[Path], None], str]] = {
    "more layers": (lambda f: change(f, adapter_layers=2), r"layers\.0\.self_attn\.adaption_prompt' is missing"),
    "too many": (lambda f: change(f, adapter_layers=3), "adapter_layers: 3 layers are requested, but the base has 2"),
    "no layers": (lambda f: change(f, adapter_layers="absent"), "adapter_layers: is missing"),
    "no length": (lambda f: change(f, adapter_len="absent"), "adapter_len: is missing"),
    "huge": (lambda f: change(f, adapter_len=10**9), r"expected \[1, 1000000000, 32\]"),
    "gpt2's": (lambda f: change(f, target_modules="attn"), "target_modules: names modules that are not llama's"),
    "others": (lambda f: change(f, target_modules="mlp"), "target_modules: is not a name of attention modules"),
    "a list": (lambda f: change(f, target_modules=["self_attn"]), "target_modules: is not a name of attention modules"),
    "gates": (
        lambda f: rewrite(f, lambda t: {**t, GATE: torch.ones(4)}),
        r"adaption_gate.*shape \[4\], expected \[1\]",
    ),
    "base": (
        lambda f: rewrite(f, lambda t: {**t, "model.norm.weight": torch.ones(32)}),
        "is not a tensor of this adapter",
    ),
}
BROKEN = {f"prefix {n}": ("random", *c) for n, c in PREFIX.items()}
BROKEN |= {f"llama_adapter {n}": (IDENTITY, *c) for n, c in LLAMA.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    for method in ("random", IDENTITY):
        attached = attach(BASE.make(), method)
        save_adapter_folder(attached, folder / method, base_name="org/base", base_fingerprint=None, revision=None)
        (folder / method / "tunekit.json").unlink()  # as peft's
    return folder


@pytest.mark.parametrize("name", BROKEN)
def test_a_malformed_folder_is_refused_by_name(name: str, folders: Path, tmp_path: Path) -> None:
    method, damage, text = BROKEN[name]
    folder = tmp_path / "a"
    shutil.copytree(folders / method, folder)
    damage(folder)
    net = BASE.make()
    plain = logits_of(net, BASE)
    with pytest.raises(AdapterError, match=text):
        attach_adapter_folder(net, folder, head_name="lm_head")
    assert torch.equal(logits_of(net, BASE), plain)
