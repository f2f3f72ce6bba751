"""The contract that every layer adapter keeps, over every method and every way a base stores its matrices.

A new method of layers is picked up by its file, with its default settings; METHODS holds those that need others here.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import tunekit.adapters.methods
import tunekit.recipe.adapters
from tests.support.peft_case import move_from_start
from tests.support.product_methods import PRODUCTS, ROTATIONS
from tests.support.vector_methods import SCALED_OUTPUTS, VECTORS
from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.adapters.base import LayerAdapter, NotMergeable
from tunekit.adapters.folder.read import attach_adapter_folder, save_adapter_folder
from tunekit.adapters.method import Method, load_method
from tunekit.adapters.targets import trained_count
from tunekit.model.call import Call, calling
from tunekit.model.quantized.weights import pack_linear, weight_of
from tunekit.recipe.adapters.adalora import AdaloraSettings
from tunekit.recipe.adapters.dora import DoraSettings
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.adapters.lora_fa import LoraFaSettings
from tunekit.recipe.reading.names import known_names, settings_class
from tunekit.recipe.training import TrainingSection

METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraSettings(r=4, alpha=6, target_modules=("layer",)),
    "dora": lambda: DoraSettings(r=4, alpha=6, target_modules=("layer",)),
    "lora_fa": lambda: LoraFaSettings(r=4, alpha=6, target_modules=("layer",)),
    "gaussian": lambda: LoraSettings(r=4, alpha=6, target_modules=("layer",), start="gaussian"),
    "orthogonal": lambda: LoraSettings(r=4, alpha=6, target_modules=("layer",), start="orthogonal"),
    "rslora": lambda: LoraSettings(r=4, alpha=6, target_modules=("layer",), use_rslora=True),
    "adalora": lambda: AdaloraSettings(init_r=4, target_r=2, alpha=6, target_modules=("layer",)),
    **VECTORS,
    **PRODUCTS,
}
LISTED = {make().method for make in METHODS.values()}
for _name in known_names("adapters"):
    if _name not in LISTED and load_method(_name).layer is not None:
        METHODS[_name] = partial(settings_class("adapters", _name), method=_name, target_modules=("layer",))
DENSE = ("dense", "no_bias", "bfloat16", "conv1d", "embedding", "scaled_embedding")
STORAGES = (*DENSE, "nf4", "fp4", "int8_weight_only", "int8")
INPUTS, OUTPUTS, VOCABULARY = 64, 48, 50
SCALE = 3.0  # of Gemma's embeddings


class Base(nn.Module):
    """A head over one layer, so that the layer's input also gets a gradient."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.before = nn.Linear(INPUTS, INPUTS)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.before(x) if x.is_floating_point() else x)


def make_base(storage: str) -> Base:
    torch.manual_seed(3)
    if storage == "embedding":
        return Base(nn.Embedding(VOCABULARY, OUTPUTS, padding_idx=0)).eval()
    if storage == "scaled_embedding":
        return Base(Gemma3TextScaledWordEmbedding(VOCABULARY, OUTPUTS, 0, SCALE)).eval()
    if storage == "conv1d":
        layer: nn.Module = Conv1D(OUTPUTS, INPUTS)
        nn.init.normal_(layer.weight, std=0.3)
    else:
        layer = nn.Linear(INPUTS, OUTPUTS, bias=storage != "no_bias")
    if storage in ("nf4", "fp4", "int8_weight_only", "int8"):
        layer = pack_linear(layer, storage, storage == "nf4", torch.float32)
    base = Base(layer).eval()
    return base.to(torch.bfloat16) if storage == "bfloat16" else base


def make_input(storage: str) -> Tensor:
    torch.manual_seed(4)
    if storage.endswith("embedding"):
        return torch.randint(0, VOCABULARY, (2, 7))
    return torch.randn(2, 7, INPUTS, dtype=torch.bfloat16 if storage == "bfloat16" else torch.float32)


def attach(base: Base, method: str, seed: int = 5) -> AttachedAdapter:
    return attach_adapter(base, METHODS[method](), seed=seed, head_name=None)


def fits(method: str, storage: str) -> bool:
    """Whether the method adapts layers of this kind at all."""
    layer = load_method(METHODS[method]().method).layer
    kind = storage.removeprefix("scaled_")
    return kind not in ("embedding", "conv1d") or (layer is not None and kind in layer.kinds)


pairs = [(method, storage) for method in METHODS for storage in STORAGES if fits(method, storage)]
every = pytest.mark.parametrize(("method", "storage"), pairs)


@every
def test_starts_as_identity_and_bypass_is_the_base(method: str, storage: str) -> None:
    base, x = make_base(storage), make_input(storage)
    plain = base(x)
    attached = attach(base, method)
    if attached.starts_as_identity():
        if method == "orthogonal":  # B A is 0 only up to rounding
            torch.testing.assert_close(base(x), plain, rtol=0, atol=0.05 if storage == "bfloat16" else 1e-5)
        else:
            assert torch.equal(base(x), plain)
    move_from_start(attached.trained().values(), 0.2, seed=6)
    assert not torch.equal(base(x), plain)
    with calling(Call(bypassed=True)):
        assert torch.equal(base(x), plain)


@every
def test_only_its_tensors_get_gradients_and_the_base_stays(method: str, storage: str) -> None:
    base = make_base(storage)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    attached = attach(base, method)
    move_from_start(attached.trained().values(), 0.2, seed=6)
    trained = attached.trained()
    base(make_input(storage)).float().square().sum().backward()
    shared = {id(p) for p in attached.shared.parameters()} if attached.shared else set()  # belongs to no layer
    assert {id(p) for p in base.parameters() if p.requires_grad} | shared == {id(p) for p in trained.values()}
    assert list(trained) == sorted(trained)
    for name, parameter in trained.items():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert all(p.grad is None for p in base.parameters() if not p.requires_grad)
    attached.detach()
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@every
def test_forward_is_the_base_layer_with_merged_weight(method: str, storage: str) -> None:
    base, x = make_base(storage), make_input(storage)
    plain = base(x)
    attached = attach(base, method)
    move_from_start(attached.trained().values(), 0.2, seed=6)
    layer = attached.layers["layer"]
    weight = weight_of(layer.base_layer)
    assert weight is not None
    matrix, bias = layer.merged(weight.read(), weight.bias)
    assert matrix.shape == weight.shape
    assert matrix.dtype == torch.float32
    running = (base(x) - plain).float()
    if storage.endswith("embedding"):
        merged = nn.functional.embedding(x, matrix - weight.read()) * (1 if storage == "embedding" else SCALE)
    else:
        assert bias is not None or weight.bias is None
        hidden = base.before(x).float()
        change = bias if bias is None or weight.bias is None else bias - weight.bias.float()
        merged = nn.functional.linear(hidden, matrix - weight.read(), change)
    if storage == "int8" and method in SCALED_OUTPUTS:  # the base's own rounding of its inputs is scaled as well
        torch.testing.assert_close(running, merged, rtol=0, atol=0.15)
        return
    # The layer's own rounding (bfloat16, LLM.int8's inputs) is in `plain` as well and cancels, unless it is scaled too.
    coarse = storage == "bfloat16" or (storage == "int8" and method in {"dora", *SCALED_OUTPUTS, *ROTATIONS})
    largest = float(merged.abs().max()) / 2  # an update that does nothing must fail
    torch.testing.assert_close(running, merged, rtol=0, atol=min(0.15, largest) if coarse else 1e-5)


@every
def test_save_and_load_is_bitwise(method: str, storage: str, tmp_path: Path) -> None:
    base, x = make_base(storage), make_input(storage)
    attached = attach(base, method)
    move_from_start(attached.trained().values(), 0.2, seed=6)
    save_adapter_folder(attached, tmp_path / "a", base_name="org/base", base_fingerprint=None, revision=None)
    other = make_base(storage)
    read = attach_adapter_folder(other, tmp_path / "a", head_name=None)
    assert read.state().keys() == attached.state().keys()
    assert all(torch.equal(read.state()[name], tensor) for name, tensor in attached.state().items())
    assert torch.equal(other(x), base(x))
    save_adapter_folder(read, tmp_path / "b", base_name="org/base", base_fingerprint=None, revision=None)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_first_values_depend_on_seed_and_module_name_alone(method: str) -> None:
    def first(seed: int, extra: bool) -> Tensor:
        base = make_base("dense")
        settings = METHODS[method]()
        if extra:
            settings = settings.model_copy(update={"target_modules": ("before", "layer")})
        torch.manual_seed(seed + extra)  # the global generator has no part in it
        state = attach_adapter(base, settings, seed=seed, head_name=None).state()
        return torch.cat([tensor.flatten() for name, tensor in state.items() if name.startswith("layer.")])

    assert torch.equal(first(1, False), first(1, True))
    constant = first(1, False).unique().numel() <= 2  # zeros and ones depend on nothing
    assert constant or not torch.equal(first(1, False), first(2, False))


@pytest.mark.parametrize("method", METHODS)
def test_meta_base_allocates_nothing(method: str) -> None:
    with torch.device("meta"):
        base = make_base("dense")
    attached = attach(base, method)
    assert all(tensor.is_meta for tensor in attached.state().values())
    counted = trained_count(attached.method, attached.settings, attached.targets)
    assert counted == sum(parameter.numel() for parameter in attached.trained().values()) > 0


DROPPING = [name for name, make in METHODS.items() if name != "miss-bat" and "dropout" in type(make()).model_fields]


@pytest.mark.parametrize("method", DROPPING)
def test_dropout_only_while_training(method: str) -> None:
    evaluated = []
    for dropout in (0.0, 0.5):
        base, x = make_base("dense"), make_input("dense")
        settings = METHODS[method]().model_copy(update={"dropout": dropout})
        move_from_start(attach_adapter(base, settings, seed=5, head_name=None).trained().values(), 0.2, seed=6)
        evaluated.append(base(x))
        base.train()
        torch.manual_seed(0)
        first, second = base(x), base(x)
        assert torch.equal(first, second) == (dropout == 0)
        torch.manual_seed(0)
        assert torch.equal(base(x), first)
    assert torch.equal(*evaluated)


SPARED = {  # by weight decay: what is no matrix; for other methods, what has one dimension
    "dora": {"lora_magnitude_vector"},
    "ia3": {"ia3_l"},
    "vera": {"vera_lambda_d", "vera_lambda_b"},
    "randlora": {"randlora_lambda", "randlora_gamma"},
    "vblora": {"vblora_logits_A", "vblora_logits_B"},
    "road": {"road_theta", "road_alpha"},
    "delora": {"delora_lambda"},
    "boft": {"boft_s"},
    "hra": {"hra_u"},
    "fourierft": set(),  # its vector and that of SHiRA are entries of a matrix
    "shira": set(),
}
BIASES = LoraSettings(r=4, bias="lora_only", lora_bias=True, target_modules=("layer",))
OUTPUT_FACTORS = {"lora_B.weight", "lora_B", "gralora_B", "gralora_B_general.weight"}


@pytest.mark.parametrize("method", METHODS)
def test_groups_spare_what_is_no_matrix_and_speed_up_output_factors(method: str) -> None:
    attached = attach(make_base("dense"), method)
    groups = attached.groups(TrainingSection(weight_decay=0.1, loraplus_ratio=16))
    names = {name: (rate, decays) for names, rate, decays in groups for name in names}
    assert names.keys() == attached.trained().keys()
    spared = {name.removeprefix("layer.") for name, (_, decays) in names.items() if not decays}
    vectors = {name.removeprefix("layer.") for name, values in attached.trained().items() if values.ndim < 2}
    assert spared == SPARED.get(METHODS[method]().method, vectors)
    fast = {name.removeprefix("layer.") for name, (rate, _) in names.items() if rate == 16}
    assert fast == {name.removeprefix("layer.") for name in names} & OUTPUT_FACTORS


def test_weight_decay_spares_biases() -> None:
    groups = attach_adapter(make_base("dense"), BIASES, seed=0, head_name=None).groups(TrainingSection())
    spared = {name for names, _, decays in groups if not decays for name in names}
    assert spared == {"layer.lora_B.bias", "layer.base_layer.bias"}


def test_unknown_attributes_are_the_base_layers() -> None:
    base = make_base("dense")
    base.layer.stride = (1,)
    attached = attach(base, "lora")
    assert base.layer.in_features == INPUTS
    assert base.layer.stride == (1,)
    assert base.layer.weight is attached.layers["layer"].base_layer.weight
    with pytest.raises(AttributeError, match="no_such"):
        _ = base.layer.no_such


def test_a_layer_that_cannot_merge_says_so() -> None:
    class Gate(LayerAdapter):
        @classmethod
        def slots(cls, settings: Any, target: Any) -> dict[str, Any]:
            return {}

        def adapted(self, x: Tensor) -> Tensor:
            return self.base_layer(x) * x.mean()

    base = make_base("dense")
    lora = attach(base, "lora")
    lora.detach()
    gated = Method(peft=lora.method.peft, layer=Gate)
    attached = attach_adapter(base, METHODS["lora"](), seed=0, head_name=None, method=gated)
    with pytest.raises(NotMergeable, match="Gate cannot be written into the weights of layer"):
        attached.layers["layer"].merged(torch.zeros(1, 1), None)


def test_settings_and_method_files_come_in_pairs() -> None:
    settings = {module.name for module in pkgutil.iter_modules(tunekit.recipe.adapters.__path__)}
    modules = {module.name for module in pkgutil.iter_modules(tunekit.adapters.methods.__path__) if not module.ispkg}
    methods = {name for name in modules if hasattr(import_module(f"tunekit.adapters.methods.{name}"), "METHOD")}
    assert settings == methods
    elsewhere = {"bitfit", "ln_tuning"}  # test_copies_contract.py
    elsewhere |= {"prefix", "llama_adapter"}  # test_prefix_contract.py
    elsewhere |= {"full"}  # runs/test_full.py
    elsewhere |= {"prompt", "p_tuning", "multitask_prompt", "cpt"}  # test_prompts_contract.py
    assert {make().method for make in METHODS.values()} | elsewhere == methods, "a method without contract tests"
