"""LoRA in groups against LoRA layer by layer: outputs, gradients, what is kept, what falls back."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.model.test_families import make_net
from tests.support.loop_case import make_case, make_rows
from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.adapters.base import Casts
from tunekit.adapters.folder.read import save_adapter_folder
from tunekit.adapters.kernels.joined_lora import GatedMlp, describe
from tunekit.adapters.method import load_method
from tunekit.adapters.targets import find_targets
from tunekit.memory.offload import BoundaryStore, prepare_layers
from tunekit.model.call import Call, calling
from tunekit.model.families.causal import FAMILY
from tunekit.model.quantized.weights import PackedLinear, pack_linear
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.model import ModelSection
from tunekit.recipe.training import TrainingSection

IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))


def adapted(
    model_type: str,
    *,
    pack: str | None = None,
    dtype: torch.dtype = torch.float32,
    config: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[Any, AttachedAdapter]:
    net: Any = make_net(model_type, **(config or {})).to(dtype)
    if pack is not None:
        for name, module in list(net.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                parent, _, own = name.rpartition(".")
                setattr(net.get_submodule(parent), own, pack_linear(module, pack, True, dtype))
    attached = attach_adapter(net, LoraSettings(**({"r": 3, "alpha": 5.0} | settings)), seed=0, head_name="lm_head")
    generator = torch.Generator().manual_seed(2)
    for parameter in attached.trained().values():
        parameter.data.normal_(0, 0.1, generator=generator)
    return net, attached


def unfused(net: Any, attached: AttachedAdapter) -> None:
    for layer in attached.layers.values():
        layer.joined = None  # type: ignore[assignment]
    for module in net.modules():
        if isinstance(module.__dict__.get("forward"), GatedMlp):
            del module.forward


def gradients(net: Any, attached: AttachedAdapter, checkpointed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    prepare_layers([layer for _, layer in FAMILY.layers(net)], checkpointed)
    net.train()
    with calling(Call(seeded=True)):  # the same dropout masks, whatever the order of products
        hidden = FAMILY.hidden(net, {"input_ids": IDS, "position_ids": torch.arange(9).repeat(2, 1)})
    (hidden * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum().backward()
    return hidden.detach(), {name: parameter.grad for name, parameter in attached.trained().items()}  # type: ignore[misc]


CASES: list[tuple[str, str | None, dict[str, Any]]] = [
    ("llama", None, {}),
    ("llama", None, {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}),
    ("llama", None, {"target_modules": ["o_proj", "gate_proj", "down_proj"]}),
    ("llama", "int8_weight_only", {}),
    ("llama", "nf4", {"use_rslora": True}),
    ("qwen2", None, {}),  # biases
    ("gemma", None, {}),  # GELU
    ("gemma3_text", None, {}),
    ("phi3", None, {}),  # fused projections
    ("starcoder2", None, {}),  # an MLP without a gate
    ("mixtral", None, {}),
    ("llama", None, {"dropout": 0.3}),  # with the masks of the plain path
    ("llama", "int8_weight_only", {"dropout": 0.5, "target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"]}),
    ("qwen2", None, {"dropout": 0.1}),
    ("starcoder2", None, {"dropout": 0.1}),
]
LINEAR = {"hidden_act": "linear"}  # gives back its input itself


@pytest.mark.parametrize(("model_type", "pack", "settings"), CASES)
@pytest.mark.parametrize("checkpointed", [0, 3])
def test_groups_equal_layers_one_by_one(
    model_type: str, pack: str | None, settings: dict[str, Any], checkpointed: int
) -> None:
    net, attached = adapted(model_type, pack=pack, **settings)
    assert attached.joined
    fused = gradients(net, attached, checkpointed)
    net, attached = adapted(model_type, pack=pack, **settings)
    unfused(net, attached)
    plain = gradients(net, attached)
    torch.testing.assert_close(fused[0], plain[0], rtol=1e-5, atol=1e-5)
    assert fused[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        assert gradient.abs().max() > 0, name
        error = (fused[1][name] - gradient).norm() / gradient.norm()
        assert error < 3e-6, (name, float(error))


def test_a_linear_activation_leaves_the_gate_as_it_is() -> None:
    fused = gradients(*adapted("llama", config=LINEAR))[1]
    net, attached = adapted("llama", config=LINEAR)
    unfused(net, attached)
    for name, plain in gradients(net, attached)[1].items():
        torch.testing.assert_close(fused[name], plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


def test_checkpointing_and_kept_casts_change_no_bit() -> None:
    net, attached = adapted("llama", dtype=torch.bfloat16)
    hidden, plain = gradients(net, attached)
    net, attached = adapted("llama", dtype=torch.bfloat16)
    with attached.casts.caching():
        again, recomputed = gradients(net, attached, checkpointed=3)
    assert torch.equal(hidden, again)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert all(gradient.dtype == torch.float32 for gradient in plain.values())


def test_bfloat16_is_as_near_to_float32_as_the_plain_path() -> None:
    exact = gradients(*adapted("llama"))[1]
    errors = {}
    for name in ("fused", "plain"):
        net, attached = adapted("llama", dtype=torch.bfloat16)
        if name == "plain":
            unfused(net, attached)
        found = gradients(net, attached)[1]
        errors[name] = sum(float((found[key] - exact[key]).norm() / exact[key].norm()) for key in exact)
    assert errors["fused"] < 1.2 * errors["plain"]


def test_only_inputs_and_what_a_gated_mlp_needs_are_kept() -> None:
    net, attached = adapted("llama", pack="int8_weight_only")
    block = net.model.layers[1].mlp
    x = torch.randn(2, 9, 32, requires_grad=True)

    def kept() -> int:
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            block(x)
        own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
        own.add(x.untyped_storage().data_ptr())
        return sum(size for pointer, size in sizes.items() if pointer not in own)

    assert kept() == 2 * (2 * 9 * 48) * 4, "gate and up"
    unfused(net, attached)
    assert kept() >= 4 * (2 * 9 * 48) * 4


def test_dropout_keeps_a_byte_an_element() -> None:
    """Of what goes into each A: a mask; not the masked input, nor a mask of the input's dtype."""
    net, _ = adapted("llama", dropout=0.1)
    net.train()
    block = net.model.layers[1].mlp
    x = torch.randn(2, 9, 32, requires_grad=True)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        block(x)
    for tensor in (x, *block.parameters()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) == 2 * (18 * 48) * 4 + 18 * (32 + 32 + 48), "gate, up and three masks"
    net.eval()
    assert torch.equal(block(x), block(x))


def test_bypass_and_hooks_take_the_plain_path() -> None:
    net, attached = adapted("llama")
    attention, mlp = net.model.layers[0].self_attn, net.model.layers[0].mlp
    x = torch.randn(1, 4, 32)
    with calling(Call(bypassed=True)):
        torch.testing.assert_close(mlp(x), type(mlp).forward(mlp, x), rtol=0, atol=0)
    seen: list[Any] = []
    for layer in (mlp.up_proj, attention.k_proj.base_layer):
        layer.register_forward_hook(lambda *values: seen.append(values))
    fused = mlp(x)
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        layer(x)
    assert len(seen) == 2
    unfused(net, attached)
    torch.testing.assert_close(fused, mlp(x), rtol=1e-6, atol=1e-6)
    detached, other = adapted("llama")
    reference = make_net("llama")
    other.detach()
    block = detached.model.layers[0].mlp
    assert torch.equal(block(x), reference.model.layers[0].mlp(x))  # type: ignore[union-attr, operator, index]


def test_layers_that_get_other_inputs_are_no_group() -> None:
    net, attached = adapted("llama")
    attention = net.model.layers[0].self_attn
    x, y = torch.randn(1, 4, 32), torch.randn(1, 4, 32)
    together = [attention.q_proj(x), attention.k_proj(y), attention.v_proj(y)]
    assert not attention.q_proj.joined.together
    unfused(net, attached)
    for ours, plain in zip(together, [attention.q_proj(x), attention.k_proj(y), attention.v_proj(y)], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)


def test_no_gradient_below_the_lowest_adapted_layer() -> None:
    net, attached = adapted("llama", layers_to_transform=(1, 2))
    seen: list[bool] = []
    for layer in net.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    gradients(net, attached)
    assert seen == [False, True, True]


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("checkpointed", [0, 3])
@pytest.mark.parametrize("targets", ["all-linear", ("o_proj", "down_proj")])
def test_below_the_lowest_adapted_layer_nothing_is_kept_or_computed_again(checkpointed: int, targets: Any) -> None:
    """No tensor of the base's embedding or lower layers is saved, and no kernel of theirs runs in the backward pass."""
    net, attached = adapted("llama", layers_to_transform=(2,), target_modules=targets)
    kept: list[tuple[int, ...]] = []
    runs: list[int] = []
    for number, layer in enumerate(net.model.layers):
        for module in layer.modules():
            module.register_forward_pre_hook(lambda *_, number=number: runs.append(number))  # type: ignore[misc]
            module.register_full_backward_pre_hook(lambda *_, number=number: runs.append(number + 100))  # type: ignore[misc]
    where: list[int] = []
    layer = net.model.layers[2]
    layer.register_forward_pre_hook(lambda *_: where.append(len(kept)))

    def note(tensor: Tensor) -> Tensor:
        if tensor.numel():
            kept.append(tuple(tensor.shape))
        return tensor

    store = BoundaryStore(None)
    prepare_layers([each for _, each in FAMILY.layers(net)], checkpointed, store)
    net.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = FAMILY.hidden(net, {"input_ids": IDS, "position_ids": torch.arange(9).repeat(2, 1)})
    assert where == [0], "something below was kept"
    assert len(store) == (1 if checkpointed else 0), "an input below was kept"
    assert set(runs) == {0, 1, 2}
    runs.clear()
    hidden.sum().backward()
    assert {number % 100 for number in runs} == {2}, "something below ran in the backward pass"
    assert all(parameter.grad is not None for parameter in attached.trained().values())


def test_gradients_against_float64() -> None:
    """Relative error of each tensor's gradient, in float32 as it is computed: no worse than one layer after another."""
    exact = {name: value.double() for name, value in double_gradients().items()}
    errors: dict[str, dict[str, float]] = {}
    for way in ("fused", "plain"):
        net, attached = adapted("llama")
        if way == "plain":
            unfused(net, attached)
        found = gradients(net, attached)[1]
        errors[way] = {name: float((found[name].double() - exact[name]).norm() / exact[name].norm()) for name in exact}
    print({way: (max(each.values()), sum(each.values()) / len(each)) for way, each in errors.items()})
    # The worst tensor is a matter of the processor's kernels: 10 units in the last place are no error of ours.
    rounding = 10 * torch.finfo(torch.float32).eps
    assert max(errors["fused"].values()) < 2e-6
    assert max(errors["fused"].values()) < max(1.2 * max(errors["plain"].values()), rounding)
    assert sum(errors["fused"].values()) < 1.2 * sum(errors["plain"].values())


def double_gradients() -> dict[str, Tensor]:
    """The same computed in float64 throughout."""
    net, attached = adapted("llama")
    net.double()
    unfused(net, attached)
    return gradients(net, attached)[1]


def test_plan_finds_the_same_groups_without_an_adapter() -> None:
    settings = LoraSettings(r=3)
    net = make_net("llama")
    targets = find_targets(net, settings, head_name="lm_head")
    groups = load_method("lora").groups(net, settings, targets)
    assert load_method("dora").groups(net, settings, targets) == []
    assert groups == adapted("llama")[1].joined
    assert describe(groups) == ("3 x gate_proj + up_proj + down_proj, 3 x o_proj, 3 x q_proj + k_proj + v_proj")
    packed = PackedLinear(4, 4, "int8", False, {}, None)
    bases = {target.name: packed for target in targets}
    assert load_method("lora").kernel.groups(net, bases, settings, targets) == [], "LLM.int8 rounds its inputs"


def test_casts_are_kept_only_while_weights_stand_still() -> None:
    casts, made = Casts(), []
    for _ in range(2):
        casts.get("a", lambda: made.append(1) or torch.ones(1))  # type: ignore[func-returns-value]
    assert len(made) == 2
    with casts.caching():
        for _ in range(3):
            casts.get("a", lambda: made.append(1) or torch.ones(1))  # type: ignore[func-returns-value]
    assert len(made) == 3
    casts.get("a", lambda: made.append(1) or torch.ones(1))  # type: ignore[func-returns-value]
    assert len(made) == 4


def test_factors_are_cast_once_a_step(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, over all micro-batches and recomputations of a step; casting every time gives the same weights."""
    steps, made = 3, []
    get = Casts.get

    def counted(self: Casts, key: Any, make: Any) -> Tensor:
        return get(self, key, lambda: made.append(key) or make())  # type: ignore[func-returns-value]

    def run() -> dict[str, Tensor]:
        section = TrainingSection(
            learning_rate=1e-2, micro_batch_size=2, gradient_accumulation_steps=3, epochs=None, max_steps=steps,
            warmup_ratio=None,
        )  # fmt: skip
        base = ModelSection(name_or_path=str(tiny_llama), dtype="bfloat16")
        case = make_case(tiny_llama, make_rows(18), training=section, model=base, checkpointed=1)
        case.run()
        return {name: value.clone() for name, value in case.adapter.trained().items()}

    monkeypatch.setattr(Casts, "get", counted)
    kept = run()
    assert made
    assert {made.count(key) for key in made} == {steps}
    monkeypatch.setattr(Casts, "caching", lambda self: nullcontext())
    fresh = run()
    assert len(made) > 10 * steps
    assert all(torch.equal(kept[name], fresh[name]) for name in kept)


def test_a_saved_tensor_brings_none_of_the_flat_buffer_along(tiny_llama: Path, tmp_path: Path) -> None:
    case = make_case(tiny_llama, make_rows(4), training=TrainingSection())
    trained = case.adapter.trained()
    storages = {value.untyped_storage().data_ptr() for value in trained.values()}
    assert len(storages) == len(case.optimizer.groups) < len(trained), "they are views"
    save_adapter_folder(case.adapter, tmp_path / "adapter", base_name="base", base_fingerprint=None, revision=None)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    saved = load_file(file)
    assert len(saved) == len(trained)
    assert file.stat().st_size < sum(value.nbytes for value in trained.values()) + 200 * len(trained)
    for name, value in trained.items():
        assert torch.equal(saved[f"base_model.model.{name}"], value), name


@pytest.mark.parametrize("bias", [True, False])
def test_a_view_of_an_output_may_be_changed_in_place(bias: bool) -> None:
    """As DeBERTa divides its positions' queries."""
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 6, bias=bias)))
    attached = attach_adapter(net, LoraSettings(r=2, target_modules=("0.0",)), seed=0, head_name=None)
    x, gradients = torch.randn(2, 3, 4), []
    for joined in (True, False):
        for layer in attached.layers.values():
            assert layer.joined is not None or not joined
            layer.joined = layer.joined if joined else None
        rows = net(x).permute(0, 2, 1)
        rows /= 2
        net.zero_grad()
        rows.square().sum().backward()
        gradients.append([value.grad.clone() for value in attached.trained().values()])  # type: ignore[union-attr]
    assert all(torch.allclose(ours, plain, atol=1e-6) for ours, plain in zip(*gradients, strict=True))
