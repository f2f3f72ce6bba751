"""Rows of tokens trained beside LoRA: the contract, merging, refusals, and a run from a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from tests.arithmetic.test_merge import write_base
from tests.support.loop_case import make_case, make_rows
from tests.support.peft_case import move_from_start
from tests.support.train_case import train_in_child, write_recipe
from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.adapters.folder.read import attach_adapter_folder, load_into, save_adapter_folder
from tunekit.adapters.targets import copied_parameters, find_targets
from tunekit.arithmetic.merge import merge
from tunekit.errors import AdapterError, RecipeError
from tunekit.model.call import Call, calling
from tunekit.model.load import load_model
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.model import ModelSection
from tunekit.recipe.training import TrainingSection
from tunekit.targets.target import find_target

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 40, 9, 4, 40, 200], [9, 9, 7, 8, 1, 2]])
BOTH = {"embed_tokens": (40, 9), "lm_head": (4, 200, 3)}


def load(folder: Path, quantization: str = "none", dtype: str = "float32") -> nn.Module:
    section = ModelSection(name_or_path=str(folder), dtype=dtype, quantization=quantization)
    return load_model(section, device=CPU).net


def attach(net: nn.Module, asked: Any, **changes: Any) -> AttachedAdapter:
    fields = {"r": 2, "target_modules": ("q_proj",), "trainable_token_indices": asked, **changes}
    return attach_adapter(net, LoraSettings(**fields), seed=0, head_name="lm_head")


def logits(net: nn.Module) -> torch.Tensor:
    return net(input_ids=IDS).logits.float()


@pytest.mark.parametrize(
    ("quantization", "dtype"), [("none", "float32"), ("none", "bfloat16"), ("nf4", "float32"), ("int8", "float32")]
)
def test_contract(tiny_llama: Path, tmp_path: Path, quantization: str, dtype: str) -> None:
    net = load(tiny_llama, quantization, dtype)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    plain = logits(net)
    attached = attach(net, BOTH)
    rows = {name: tensor for name, tensor in attached.trained().items() if "token_adapter" in name}
    assert {name: len(tensor) for name, tensor in rows.items()} == {
        "lm_head.token_adapter.trainable_tokens_delta": 3,
        "model.embed_tokens.token_adapter.trainable_tokens_delta": 2,
    }
    groups = attached.groups(TrainingSection())
    assert rows.keys() <= {name for names, _, decays in groups if not decays for name in names}
    torch.testing.assert_close(logits(net), plain, rtol=0, atol=0.05 if dtype == "bfloat16" else 1e-5)
    move_from_start(attached.trained().values(), 0.3)
    changed = logits(net)
    assert (changed - plain).abs().max() > 1e-2
    with calling(Call(bypassed=True)):
        assert torch.equal(logits(net), plain)
    changed.square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().max() > 0 for tensor in rows.values())
    assert {id(p) for p in net.parameters() if p.requires_grad} == {id(p) for p in attached.trained().values()}
    save_adapter_folder(attached, tmp_path / "a", base_name="org/base", base_fingerprint=None, revision=None)
    other = load(tiny_llama, quantization, dtype)
    read = attach_adapter_folder(other, tmp_path / "a", head_name="lm_head")
    assert all(torch.equal(read.state()[name], tensor) for name, tensor in attached.state().items())
    assert torch.equal(logits(other), changed)
    attached.detach()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_only_the_rows_are_counted_and_trained(tiny_llama: Path) -> None:
    net = load(tiny_llama)
    width = net.config.hidden_size
    settings = LoraSettings(r=2, target_modules=("q_proj",), trainable_token_indices=BOTH)
    attached = attach_adapter(net, settings, seed=0, head_name="lm_head")
    assert copied_parameters(net, attached.method, settings, attached.targets) == 5 * width
    numbers = sum(tensor.numel() for tensor in attached.trained().values())
    assert numbers == 5 * width + sum(target.trainable_parameters for target in attached.targets)


def test_the_merged_rows_are_the_trained_ones_and_the_others_the_base(tiny_llama: Path) -> None:
    net = load(tiny_llama)
    original = net.model.embed_tokens.weight.clone()
    attached = attach(net, (40, 9, 7))
    move_from_start(attached.trained().values(), 0.3)
    merged = attached.tokens["model.embed_tokens"].merged(original)
    rows = attached.trained()["model.embed_tokens.token_adapter.trainable_tokens_delta"]
    assert torch.equal(merged[[40, 9, 7]], rows)
    others = [number for number in range(len(original)) if number not in (40, 9, 7)]
    assert torch.equal(merged[others], original[others])


def test_trained_rows_are_scaled_where_the_base_scales_its_own(tiny_llama: Path) -> None:
    """As Gemma does."""
    net, ids = load(tiny_llama), torch.tensor([[40, 3, 9]])
    scaled = Gemma3TextScaledWordEmbedding(*net.model.embed_tokens.weight.shape, 0, 3.0)
    net.set_input_embeddings(scaled)
    attached = attach(net, (40, 9))
    move_from_start(attached.trained().values(), 0.3)
    merged = attached.tokens["model.embed_tokens"].merged(scaled.weight)
    torch.testing.assert_close(net.model.embed_tokens(ids), nn.functional.embedding(ids, merged) * 3)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("asked", [(40, 9), {"embed_tokens": (40, 9), "lm_head": (5,)}], ids=["one", "two"])
def test_merged_model_folder(tmp_path: Path, tied: bool, asked: Any) -> None:
    base = write_base(tmp_path / "base", "llama", tie_word_embeddings=tied)
    net = load(base)
    attached = attach(net, asked)
    move_from_start(attached.trained().values(), 0.3)
    expected = logits(net)
    folder = tmp_path / "adapter"
    facts = {"base_fingerprint": None, "revision": None, "base_dtype": "float32"}
    save_adapter_folder(attached, folder, base_name=str(base), **facts)
    result = merge(find_target(str(folder), None, []), tmp_path / "merged")
    assert result.difference.largest < 1e-4
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, rtol=0, atol=1e-5)
    stays_tied = tied and not isinstance(asked, dict)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is stays_tied
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert ("lm_head.weight" in written) is not stays_tied


REFUSED = [
    ({"embed_token": (3,)}, {}, "matches no module of the base.*did you mean 'embed_tokens'"),
    ((262, 10**6), {}, "'model.embed_tokens' has no row 1000000"),
    ({"input_layernorm": (3,)}, {}, "LlamaRMSNorm.*is not an embedding or a linear layer"),
    ((3,), {"modules_to_save": ("embed_tokens",)}, "modules_to_save also trains"),
    ((3,), {"target_modules": ("q_proj", "embed_tokens")}, "target_modules also trains"),
    ({"lm_head": (3,)}, {"modules_to_save": ("lm_head",)}, "modules_to_save also trains"),
]


@pytest.mark.parametrize(("asked", "changes", "message"), REFUSED)
def test_refusals(tiny_llama: Path, asked: Any, changes: dict[str, Any], message: str) -> None:
    fields = {"r": 2, "target_modules": ("q_proj",), "trainable_token_indices": asked, **changes}
    with pytest.raises(RecipeError, match=message) as refusal:
        find_targets(load(tiny_llama), LoraSettings(**fields), head_name="lm_head")
    assert refusal.value.problems[0].key == "adapter.trainable_token_indices"


def test_a_tied_head_may_not_be_trained_in_another_way(tmp_path: Path) -> None:
    net = load(write_base(tmp_path / "base", "llama", tie_word_embeddings=True))
    for changes in ({"modules_to_save": ("lm_head",)}, {"target_modules": ("q_proj", "lm_head")}):
        with pytest.raises(RecipeError, match="also trains 'lm_head', which shares them"):
            attach(net, (3,), **changes)


def test_a_file_with_other_rows_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    attached = attach(load(tiny_llama), (40, 9))
    save_adapter_folder(attached, tmp_path / "a", base_name="org/base", base_fingerprint=None, revision=None)
    (tmp_path / "a" / "tunekit.json").unlink()
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    for value, message in (
        ([40], "has shape"),
        ([40, 10**6], "has no row"),
        ([40, -1], "malformed"),
        (None, "is not a tensor of this adapter"),
    ):
        path.write_text(json.dumps(config | {"trainable_token_indices": value}))
        with pytest.raises(AdapterError, match=message):
            attach_adapter_folder(load(tiny_llama), tmp_path / "a", head_name="lm_head")


def test_training_goes_on_from_a_folder(tiny_llama: Path, tmp_path: Path) -> None:
    first = attach(load(tiny_llama), (40, 9))
    move_from_start(first.trained().values(), 0.3)
    save_adapter_folder(first, tmp_path / "a", base_name="org/base", base_fingerprint=None, revision=None)
    second = attach(load(tiny_llama), {"model.embed_tokens": (40, 9)})
    load_into(second, tmp_path / "a")
    assert all(torch.equal(second.state()[name], tensor) for name, tensor in first.state().items())
    for asked in ((9, 40), (40, 8), ()):
        with pytest.raises(AdapterError, match="the trained tokens of the folder and of the recipe differ"):
            load_into(attach(load(tiny_llama), asked), tmp_path / "a")


def test_gradient_checkpointing_changes_no_bit(tiny_llama: Path) -> None:
    def run(checkpointed: int) -> dict[str, torch.Tensor]:
        section = TrainingSection(learning_rate=0.02, epochs=None, max_steps=4, micro_batch_size=4)
        settings = LoraSettings(r=2, target_modules=("q_proj",), trainable_token_indices=tuple(range(3, 40)))
        case = make_case(tiny_llama, make_rows(8), training=section, adapter=settings, checkpointed=checkpointed)
        case.run()
        return case.adapter.state()

    plain, recomputed = run(0), run(2)
    assert all(torch.equal(recomputed[name], tensor) for name, tensor in plain.items())


@pytest.mark.drawn
def test_a_run_from_a_recipe(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", tie_word_embeddings=True)
    recipe = write_recipe(tmp_path, base, adapter={"trainable_token_indices": [5, 4, 60]})
    ended = train_in_child(recipe, tmp_path / "run")
    assert ended.code == 0, ended.output
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["trainable_parameters"] == sum(t["trainable_parameters"] for t in plan["targets"]) + 3 * 64
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == [5, 4, 60]
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    rows = tensors["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    original = load(base).model.embed_tokens.weight[[5, 4, 60]]
    assert (rows != original).any(dim=1).all()  # a tied head's rows get a gradient from every token
