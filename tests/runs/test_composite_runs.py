"""Whole runs on composite models: each gives the numbers of the same run on their language model's own class."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

from tests.support.composite_case import PROCESSOR_FILES, language_model, write_composite
from tests.support.train_case import (
    check_a_resume,
    check_streamed,
    records,
    train,
    without_times,
    write_recipe,
    write_sections,
)  # fmt: skip
from tunekit.errors import RecipeError
from tunekit.generate import generate_verb

REWARD = "def letters(completions, **columns):\n    return [len(set(text)) / 10 for text in completions]\n"
PAIRS = [{"prompt": f"say {n}", "chosen": f"so {n}", "rejected": "no", "answer": str(n)} for n in range(12)]
GRPO = {"method": "grpo", "num_generations": 2, "max_completion_length": 6}
WORK: dict[str, dict[str, Any]] = {  # sections of the recipe
    "sft": {"evaluation": {"generate": True, "max_new_tokens": 6, "metrics": ["loss", "exact_match"]}},
    "nf4": {"model": {"quantization": "nf4"}},
    "int8": {"model": {"quantization": "int8"}},
    "dpo": {"objective": {"method": "dpo"}},
    "grpo": {"objective": GRPO | {"reward": [{"function": "rewards.py:letters", "allow_code": True}]}},
}


def recipe_of(place: Path, folder: Path, work: str) -> Path:
    """IA3 starts with ones, whatever the modules are called."""
    sections = WORK[work]
    model = {"name_or_path": str(folder), "dtype": "float32", **sections.get("model", {})}
    training = {"epochs": None, "max_steps": 3, "gradient_accumulation_steps": 1, "scheduler": "constant"}
    path = write_recipe(place, folder, training=training, **{**sections, "model": model})
    values = json.loads(path.read_text())
    values["training"]["warmup_ratio"] = 0.0
    path = write_sections(place, values | {"adapter": {"method": "ia3", "target_modules": ["v_proj", "down_proj"]}}, {})
    if "objective" in sections:
        rows = PAIRS if work == "dpo" else [{key: row[key] for key in ("prompt", "answer")} for row in PAIRS]
        (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (place / "rewards.py").write_text(REWARD, encoding="utf-8")
    return path


LANGUAGE = re.compile(r"^(model\.)?language_model\.|^lm_head\.")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def write_text_class(model_type: str, folder: Path, text: Path) -> None:
    """The language model of the composite model in `folder`, as a model of its own."""
    net = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32)
    config = net.config.get_text_config()
    config.tie_word_embeddings = net.config.tie_word_embeddings
    own = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    own.model.load_state_dict(net.get_submodule(language_model(model_type)).state_dict())
    own.lm_head.load_state_dict(net.get_output_embeddings().state_dict())
    shutil.copytree(folder, text, ignore=shutil.ignore_patterns("*.safetensors*", "config.json", "*processor*"))
    own.save_pretrained(text)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("model_type", ["qwen3_5", "gemma3"])
def test_a_run_equals_that_of_the_text_class(model_type: str, work: str, tmp_path: Path) -> None:
    write_text_class(model_type, write_composite(model_type, tmp_path / "composite"), tmp_path / "text")
    kinds = ("composite", "text")
    runs = [train(recipe_of(tmp_path / f"{kind}-run", tmp_path / kind, work)) for kind in kinds]
    composite, text = (without_times(records(run)) for run in runs)
    assert composite == text
    assert len({record["grad_norm"] for record in composite if "loss" in record}) == 3


STREAMED = ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("model_type", STREAMED)
def test_a_streamed_run_equals_the_resident_one(model_type: str, quantization: str, tmp_path: Path) -> None:
    folder = write_composite(model_type, tmp_path / "model")
    model = {"name_or_path": str(folder), "dtype": "float32", "quantization": quantization}
    check_streamed(write_recipe(tmp_path, folder, model=model, training={"epochs": None, "max_steps": 2}), "disk")


def test_a_type_that_was_not_tested_is_not_streamed(tmp_path: Path) -> None:
    """Gemma 4's layers read a second embedding, each its own part."""
    recipe = write_recipe(tmp_path, write_composite("gemma4", tmp_path / "model"))
    with pytest.raises(RecipeError, match=r"gemma4_text with layer streaming; set memory\.streaming to off") as caught:
        train(recipe, "memory.streaming=disk")
    assert "\n" not in str(caught.value)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("model_type", ["qwen3_5", "gemma3"])
def test_an_interrupted_run_is_resumed(model_type: str, tmp_path: Path) -> None:
    folder = write_composite(model_type, tmp_path / "model")
    check_a_resume(write_recipe(tmp_path, folder, training={"epochs": None, "max_steps": 4, "save_steps": 2}))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_vl", "gemma3"])
def test_full_training_keeps_all_that_it_does_not_train(
    model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The towers, and Qwen 3.5's head for several tokens, which no class of transformers loads."""
    folder = write_composite(model_type, tmp_path / "model")
    path = write_recipe(tmp_path, folder, training={"epochs": None, "max_steps": 2, "warmup_ratio": 0.0})
    values = json.loads(path.read_text()) | {"adapter": {"method": "full"}}
    run = train(write_sections(tmp_path, values, {}))
    before, after = tensors_of(folder), tensors_of(run / "model")
    assert before.keys() == after.keys()
    outside = [name for name in before if not LANGUAGE.search(name)]
    assert outside
    assert all(torch.equal(before[name], after[name]) for name in outside)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name in PROCESSOR_FILES:
        assert (run / "model" / name).read_bytes() == (folder / name).read_bytes()
    generate_verb(str(run), None, ["say 3"], None, [], max_new_tokens=4)
    assert capsys.readouterr().out
