"""Adapters of composite models: merged into the base's own files, and renamed between the classes of one model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.support.composite_case import PROCESSOR_FILES, SHAPES, write_composite
from tunekit.adapter import rename_verb
from tunekit.adapters.attach import attach_adapter
from tunekit.adapters.folder.applied import check_applied
from tunekit.adapters.folder.class_names import renames_for
from tunekit.adapters.folder.read import attach_adapter_folder, save_adapter_folder
from tunekit.arithmetic.merge import merge
from tunekit.errors import AdapterError, ModelError, RecipeError
from tunekit.model.load import LoadedModel, load_model
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.model import ModelSection
from tunekit.targets.target import find_target

CPU = torch.device("cpu")
IDS = torch.randint(3, 260, (1, 12), generator=torch.Generator().manual_seed(2))


def load(folder: Path) -> LoadedModel:
    return load_model(ModelSection(name_or_path=str(folder), dtype="float32"), device=CPU)


def save_adapter(base: LoadedModel, folder: Path, **settings: Any) -> Path:
    """An adapter with random tensors."""
    lora = LoraSettings(**{"r": 4, **settings})
    attached = attach_adapter(base.net, lora, seed=0, head_name=base.family.head_name(base.net))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in attached.trained().values():
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    name = base.facts.name_or_path
    save_adapter_folder(attached, folder, base_name=name, base_fingerprint=base.fingerprint, revision=None)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def served_logits(net: Any, model_type: str) -> torch.Tensor:
    """What the class in config.json computes from text. Llama 4's own forward fails in transformers 5.24."""
    with torch.no_grad():
        net = net.language_model if model_type == "llama4" else net
        return net(input_ids=IDS).logits[0].float()  # type: ignore[no-any-return]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("model_type", SHAPES)
def test_a_merge_keeps_the_bases_names_and_all_other_tensors(model_type: str, tmp_path: Path) -> None:
    base_folder = write_composite(model_type, tmp_path / "base")
    base = load(base_folder)
    adapter = save_adapter(base, tmp_path / "adapter")
    check_applied(base.net, adapter)
    running = base.family.scores(base.net, base.family.inputs_of(IDS))
    merge(find_target(str(adapter), None, []), tmp_path / "merged")
    before, after = tensors_of(base_folder), tensors_of(tmp_path / "merged")
    assert before.keys() == after.keys()
    changed = {name for name in before if digest(before[name]) != digest(after[name])}
    adapted = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    assert len(changed) == len(load_file(adapter / "adapter_model.safetensors")) // 2
    assert not any(part in name for name in changed for part in ("visi", "visual", "mtp", "projector", "connector"))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base_folder, tmp_path / "merged")]
    assert configs[0]["architectures"] == configs[1]["architectures"], adapted
    for name in PROCESSOR_FILES:
        assert (tmp_path / "merged" / name).read_bytes() == (base_folder / name).read_bytes()
    net, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] | info["mismatched_keys"]
    torch.testing.assert_close(served_logits(net.eval(), model_type), running, rtol=0, atol=1e-4)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("model_type", SHAPES)
def test_peft_applies_the_adapter_in_the_served_class(model_type: str, tmp_path: Path) -> None:
    base_folder = write_composite(model_type, tmp_path / "base")
    base = load(base_folder)
    adapter = save_adapter(base, tmp_path / "adapter")
    running = base.family.scores(base.net, base.family.inputs_of(IDS))
    net = AutoModelForImageTextToText.from_pretrained(base_folder, dtype=torch.float32)
    plain = served_logits(net.eval(), model_type)
    adapted = peft.PeftModel.from_pretrained(net, str(adapter)).eval()
    assert (running - plain).abs().max() > 0.01
    torch.testing.assert_close(served_logits(adapted.base_model.model, model_type), running, rtol=0, atol=1e-4)
    saved = {key.replace(".lora_A.weight", "") for key in load_file(adapter / "adapter_model.safetensors")}
    modules = {name.replace(".lora_A.default", "") for name, _ in adapted.named_modules() if name.endswith("A.default")}
    assert modules == {name for name in saved if "lora_B" not in name}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("model_type", SHAPES)
def test_names_of_the_text_class_are_read_and_renamed(model_type: str, tmp_path: Path) -> None:
    base = load(write_composite(model_type, tmp_path / "base"))
    adapter = save_adapter(base, tmp_path / "adapter")
    running = base.family.scores(base.net, base.family.inputs_of(IDS))
    rename_verb(str(adapter), "text", None, str(tmp_path / "text"))
    keys = load_file(tmp_path / "text" / "adapter_model.safetensors")
    assert all(key.startswith(("base_model.model.model.layers.", "base_model.model.model.per_")) for key in keys)
    target = find_target(str(tmp_path / "text"), None, [])
    assert target.adapter != tmp_path / "text"
    assert "read as" in target.notes[-1]
    plain, head = load(tmp_path / "base"), base.family.head_name(base.net)
    with pytest.raises(AdapterError, match=r"names of another class.*adapter convert"):
        attach_adapter_folder(plain.net, tmp_path / "text", head_name=head)
    attach_adapter_folder(plain.net, target.adapter, head_name=head)
    torch.testing.assert_close(plain.family.scores(plain.net, plain.family.inputs_of(IDS)), running)
    rename_verb(str(tmp_path / "text"), "base", None, str(tmp_path / "again"))
    names = ("adapter_model.safetensors", "adapter_config.json")
    first, again = ([(folder / name).read_bytes() for name in names] for folder in (adapter, tmp_path / "again"))
    assert first == again


def test_an_adapter_of_the_composite_class_is_read_on_the_text_model(tmp_path: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForCausalLM

    composite = load(write_composite("gemma3", tmp_path / "composite"))
    adapter = save_adapter(composite, tmp_path / "adapter")
    config = Gemma3Config.from_pretrained(tmp_path / "composite").text_config
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "text")
    base = load(tmp_path / "text")
    renames = renames_for(base.net, "lm_head", adapter)
    assert renames["model.language_model"] == "model"
    with pytest.raises(AdapterError, match="names of another class"):
        attach_adapter_folder(base.net, adapter, head_name="lm_head")


def test_targets_outside_of_the_language_model_are_refused(tmp_path: Path) -> None:
    base = load(write_composite("qwen3_vl", tmp_path))
    with pytest.raises(RecipeError, match="'qkv' matches only modules outside of the language model"):
        attach_adapter(base.net, LoraSettings(target_modules=("qkv",)), seed=0, head_name="lm_head")


def test_a_merge_needs_the_processors_files(tmp_path: Path) -> None:
    base_folder = write_composite("llava", tmp_path / "base")
    adapter = save_adapter(load(base_folder), tmp_path / "adapter")
    for name in PROCESSOR_FILES:
        (base_folder / name).unlink()
    with pytest.raises(ModelError, match="contains no processor files"):
        merge(find_target(str(adapter), None, []), tmp_path / "merged")
