"""LoRA of fused expert weights: the contract, training, merging into files of single experts, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.arithmetic.test_merge import write_base
from tests.support.loop_case import check_four_steps
from tests.support.peft_case import move_from_start
from tests.support.train_case import train_in_child, write_recipe
from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.adapters.folder.read import attach_adapter_folder, load_into, save_adapter_folder
from tunekit.adapters.targets import find_targets, trained_count
from tunekit.arithmetic.merge import merge
from tunekit.errors import AdapterError, RecipeError
from tunekit.model.call import Call, calling
from tunekit.model.load import load_model
from tunekit.recipe.adapters.dora import DoraSettings
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.adapters.lora_fa import LoraFaSettings
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import ModelSection
from tunekit.targets.target import find_target

BOTH = ("experts.gate_up_proj", "experts.down_proj")
FIELDS: dict[str, Any] = {"r": 3, "alpha": 6.0, "target_parameters": BOTH, "target_modules": ("o_proj",)}
IDS = torch.tensor([[3, 40, 9, 4, 40, 200], [9, 9, 7, 8, 1, 2]])
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("mixture") / "base", "mixtral", num_local_experts=4)


def load(folder: Path, quantization: str = "none", dtype: str = "float32") -> nn.Module:
    section = ModelSection(name_or_path=str(folder), dtype=dtype, quantization=quantization)
    return load_model(section, device=CPU).net


def attach(net: nn.Module, settings: Any) -> AttachedAdapter:
    return attach_adapter(net, settings, seed=0, head_name="lm_head")


def logits(net: nn.Module) -> Tensor:
    return net(input_ids=IDS).logits.float()


@pytest.mark.parametrize("kind", [LoraSettings, LoraFaSettings])
@pytest.mark.parametrize(
    ("quantization", "dtype"), [("none", "float32"), ("none", "bfloat16"), ("nf4", "float32"), ("int8", "float32")]
)
def test_contract(mixture: Path, tmp_path: Path, kind: Any, quantization: str, dtype: str) -> None:
    net = load(mixture, quantization, dtype)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    plain = logits(net)
    alone = {"target_modules": ()} if kind is LoraFaSettings else {}  # its folder is read as lora, which rounds layers
    attached = attach(net, kind(**{**FIELDS, **alone}))  # otherwise
    assert torch.equal(logits(net), plain)
    move_from_start(attached.trained().values(), 0.2)
    changed = logits(net)
    assert (changed - plain).abs().max() > 1e-2
    with calling(Call(bypassed=True)):
        assert torch.equal(logits(net), plain)
    changed.square().sum().backward()
    trained = attached.trained()
    assert len([name for name in trained if "experts" in name]) == (8 if kind is LoraSettings else 4)
    assert {id(p) for p in net.parameters() if p.requires_grad} == {id(p) for p in trained.values()}
    assert all(tensor.grad is not None and tensor.grad.abs().max() > 0 for tensor in trained.values())
    save_adapter_folder(attached, tmp_path / "a", base_name="org/base", base_fingerprint=None, revision=None)
    other = load(mixture, quantization, dtype)
    read = attach_adapter_folder(other, tmp_path / "a", head_name="lm_head")
    assert all(torch.equal(read.state()[name], tensor) for name, tensor in attached.state().items())
    assert torch.equal(logits(other), changed)
    attached.detach()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_names_nest_as_peft_wraps(mixture: Path, tmp_path: Path) -> None:
    attached = attach(load(mixture), LoraSettings(**FIELDS))
    save_adapter_folder(attached, tmp_path / "a", base_name="org/base", base_fingerprint=None, revision=None)
    shapes = {
        name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "a" / "adapter_model.safetensors").items()
    }
    place = "base_model.model.model.layers.1.mlp.experts."
    assert {name.removeprefix(place): shape for name, shape in shapes.items() if name.startswith(place)} == {
        "base_layer.lora_A.weight": (12, 64),  # gate_up_proj: r 3, 4 experts
        "base_layer.lora_B.weight": (192, 12),
        "lora_A.weight": (12, 96),  # down_proj, the last of the module
        "lora_B.weight": (64, 12),
    }
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["down_proj", "gate_up_proj"]
    one = attach(load(mixture), LoraSettings(**{**FIELDS, "target_parameters": BOTH[:1]}))
    keys = {one.slots()[name][0].file_key(name) for name in one.state() if "experts" in name}
    assert keys == {f"{place.replace('.1.', f'.{layer}.')}lora_{x}.weight" for layer in (0, 1) for x in "AB"}


def test_counted_numbers_are_the_trained_ones(mixture: Path) -> None:
    attached = attach(load(mixture), LoraSettings(**FIELDS))
    counted = trained_count(attached.method, attached.settings, attached.targets)
    assert counted == sum(tensor.numel() for tensor in attached.trained().values())


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_merged_parameters_compute_the_same(mixture: Path, implementation: str) -> None:
    net = load(mixture)
    net.config._experts_implementation = implementation
    attached = attach(net, LoraSettings(**{**FIELDS, "target_modules": ()}))
    move_from_start(attached.trained().values(), 0.2)
    expected = logits(net)
    attached.detach()
    with torch.no_grad():
        for adapter in attached.parameters.values():
            adapter.parameter.copy_(adapter.merged(adapter.parameter))
    torch.testing.assert_close(logits(net), expected, rtol=0, atol=1e-5)


@pytest.mark.drawn
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("mixtral", {"num_local_experts": 4}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}),
        ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
    ],
)
def test_merged_model_folder(tmp_path: Path, architecture: str, changes: dict[str, Any]) -> None:
    """Two of these store expert by expert, and their merged folders too; the third stores them fused and transposed."""
    base = write_base(tmp_path / "base", architecture, **changes)
    net = load(base)
    attached = attach(net, LoraSettings(**FIELDS))
    move_from_start(attached.trained().values(), 0.2)
    expected = logits(net)
    facts = {"base_fingerprint": None, "revision": None, "base_dtype": "float32"}
    save_adapter_folder(attached, tmp_path / "adapter", base_name=str(base), **facts)
    result = merge(find_target(str(tmp_path / "adapter"), None, []), tmp_path / "merged")
    assert result.difference.largest < 1e-4
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, rtol=0, atol=1e-5)
    rounded = merge(find_target(str(tmp_path / "adapter"), None, []), tmp_path / "half", None, torch.bfloat16)
    assert rounded.difference.unrounded is not None
    assert rounded.difference.rounding is not None
    assert rounded.difference.unrounded < 1e-4 < rounded.difference.rounding
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}


REFUSED: list[tuple[Any, dict[str, Any], str, str]] = [
    (
        LoraSettings,
        {"target_parameters": ("experts.gate_proj",)},
        "target_parameters",
        "did you mean 'experts.gate_up_proj'",
    ),
    (LoraSettings, {"target_parameters": ("up",)}, "target_parameters", "did you mean 'down_proj' or 'gate_up_proj'"),
    (LoraSettings, {"target_modules": ("w1",)}, "target_modules", r"write target_parameters: \[experts.gate_up_proj\]"),
    (LoraSettings, {"dropout": 0.1}, "dropout", "write dropout: 0"),
    (LoraSettings, {"start": "orthogonal", "r": 2}, "start", "cannot initialise fused parameters"),
    (LoraSettings, {"modules_to_save": ("mlp",)}, "target_parameters", "which is fully trained"),
    (LoraSettings, {"r": 65}, "r", "rank 65 is too large"),
    (DoraSettings, {}, "target_parameters", "use the method lora"),
]


@pytest.mark.parametrize(("kind", "changes", "key", "message"), REFUSED)
def test_refusals(mixture: Path, kind: Any, changes: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as refusal:
        find_targets(load(mixture), kind(**{**FIELDS, **changes}), head_name="lm_head")
    assert refusal.value.problems[0].key == f"adapter.{key}"


def test_only_the_chosen_layers(mixture: Path) -> None:
    attached = attach(load(mixture), LoraSettings(**FIELDS, layers_to_transform=(1,)))
    assert {name.split(".")[2] for name in attached.state()} == {"1"}


def test_nothing_to_adapt_is_refused_in_the_recipe(tmp_path: Path, mixture: Path) -> None:
    recipe = write_recipe(tmp_path, mixture, adapter={"target_modules": []})
    with pytest.raises(RecipeError, match="names no layer"):
        load_recipe(str(recipe), [])


def test_files_are_refused_by_name(mixture: Path, tmp_path: Path) -> None:
    attached = attach(load(mixture), LoraSettings(**FIELDS))
    save_adapter_folder(attached, tmp_path / "a", base_name="org/base", base_fingerprint=None, revision=None)
    (tmp_path / "a" / "tunekit.json").unlink()
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    for changes, message in (
        ({"target_parameters": ["down_proj"]}, "is not a tensor of this adapter"),
        ({"target_parameters": ["q_proj.weight"]}, "q_proj.lora_A.weight' is missing"),
        ({"target_parameters": ["missing.weight"]}, "target_parameters"),
        ({"target_parameters": None}, "is not a tensor of this adapter"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"r": 4}, "has shape"),
    ):
        path.write_text(json.dumps(config | changes))
        with pytest.raises(AdapterError, match=message):
            attach_adapter_folder(load(mixture), tmp_path / "a", head_name="lm_head")


def test_training_goes_on_from_a_folder(mixture: Path, tmp_path: Path) -> None:
    first = attach(load(mixture), LoraSettings(**FIELDS))
    move_from_start(first.trained().values(), 0.2)
    save_adapter_folder(first, tmp_path / "a", base_name="org/base", base_fingerprint=None, revision=None)
    second = attach(load(mixture), LoraSettings(**{**FIELDS, "target_parameters": ("gate_up_proj", "down_proj")}))
    load_into(second, tmp_path / "a")
    assert all(torch.equal(second.state()[name], tensor) for name, tensor in first.state().items())
    other = attach(load(mixture), LoraSettings(**{**FIELDS, "target_parameters": BOTH[:1]}))
    with pytest.raises(AdapterError, match="down_proj is adapted in the folder but not in the recipe"):
        load_into(other, tmp_path / "a")


def test_four_steps(mixture: Path) -> None:
    check_four_steps(mixture, LoraSettings(**{**FIELDS, "target_modules": ()}))


@pytest.mark.drawn
def test_a_run_from_a_recipe(mixture: Path, tmp_path: Path) -> None:
    adapter = {"dropout": 0.0, "target_modules": [], "target_parameters": list(BOTH)}
    recipe = write_recipe(tmp_path, mixture, adapter=adapter)
    ended = train_in_child(recipe, tmp_path / "run")
    assert ended.code == 0, ended.output
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert plan["trainable_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert len(plan["targets"]) == 4
    assert not [note for note in plan["notes"] if "activations" in note], plan["notes"]
