"""Every shipped recipe, found recursively: loads, plans without a refusal, and trains three steps on a tiny twin.

The twin has the recipe's kind of layers, random weights and one token per byte; data, adapter, quantization, optimizer
and all else are the recipe's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.composite_case import write_composite
from tests.support.image_text_case import write_image_text
from tests.support.speech_case import write_tiny_whisper
from tests.support.tiny_pipelines import saved_pipeline
from tests.support.tiny_vit import write_tiny_vit
from tunekit.plan import plan_verb
from tunekit.recipe.load import load_recipe
from tunekit.recipe.reading.shipped import first_comment, shipped_recipes
from tunekit.train import train_verb

RECIPES = shipped_recipes()
STEPS = 3
SMALLER = {  # what a recipe asks of a real model and a tiny twin, or three steps, cannot give
    "dreambooth-lora": ["objective.resolution=16", "objective.num_inference_steps=2"],
    "image-classify-lora": ["objective.resolution=16"],
    "distill-lora": ["objective.teacher=builtin:tiny-llama"],
    "sft-adalora": ["adapter.tinit=1", "adapter.tfinal=1"],
    "sft-llama-adapter": ["adapter.adapter_layers=2"],
    "sft-vera": ["adapter.r=8"],
}


def write_twin(folder: Path, make: Callable[[int], Any], *, chat_template: bool) -> Path:
    """The net that `make(vocabulary size)` makes, seeded, beside the built-in tiny model's tokenizer."""
    import torch
    from transformers import AutoTokenizer

    from tunekit.model.storage.builtin import tiny_model_folder

    tiny = tiny_model_folder("builtin:tiny-llama")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    if not chat_template:
        tokenizer.chat_template = None
    torch.manual_seed(0)
    make(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_qwen2(vocabulary_size: int) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary_size, bos_token_id=0, eos_token_id=2, **sizes, **heads))


def make_gpt2(vocabulary_size: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary_size, bos_token_id=0, eos_token_id=2, **sizes))


def make_t5(vocabulary_size: int) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4}
    ids = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=vocabulary_size, **sizes, **ids))


def make_bert(vocabulary_size: int) -> Any:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertModel(BertConfig(vocab_size=vocabulary_size, **sizes))


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What stands in for each base that a recipe names; a new base needs an entry."""
    folder = tmp_path_factory.mktemp("twins")
    return {
        "builtin:tiny-llama": "builtin:tiny-llama",
        "HuggingFaceTB/SmolLM2-135M-Instruct": "builtin:tiny-llama",
        "SmolLM2-135M-Instruct.Q4_1.gguf": "builtin:tiny-llama",
        "Qwen/Qwen2.5-7B-Instruct": str(write_twin(folder / "qwen2", make_qwen2, chat_template=True)),
        "Qwen/Qwen3-VL-4B-Instruct": str(write_composite("qwen3_vl", folder / "qwen3_vl")),
        "sentence-transformers/all-MiniLM-L6-v2": str(write_twin(folder / "bert", make_bert, chat_template=False)),
        "Qwen/Qwen2.5-VL-3B-Instruct": str(write_image_text("qwen2_5_vl", folder / "qwen-vl")),
        "openai/whisper-tiny": str(write_tiny_whisper(folder / "whisper")),
        "stable-diffusion-v1-5/stable-diffusion-v1-5": str(saved_pipeline(folder / "sd", "sd")),
        "google/vit-base-patch16-224-in21k": str(write_tiny_vit(folder / "vit")),
        "google/flan-t5-base": str(write_twin(folder / "t5", make_t5, chat_template=False)),
        "openai-community/gpt2": str(write_twin(folder / "gpt2", make_gpt2, chat_template=False)),
    }


def tiny_overrides(recipe: Path, twins: dict[str, str], output: Path) -> list[str]:
    """KEY=VALUE texts that make a recipe small, and nothing else about it different."""
    name = load_recipe(recipe).recipe.model.name_or_path
    written = yaml.safe_load(recipe.read_text("utf-8"))
    twin = twins[Path(name).name if name.endswith(".gguf") else name]
    overrides = [f"model.name_or_path={twin}", f"output.dir={output}", f"training.max_steps={STEPS}"]
    if "epochs" in written["training"]:
        overrides.append("~training.epochs")
    if "eval" in written["data"]:
        overrides.append(f"training.eval_steps={STEPS}")
    if written.get("evaluation", {}).get("max_new_tokens"):
        overrides.append("evaluation.max_new_tokens=4")
    sizes = ["data.max_length=512", "training.gradient_accumulation_steps=2"]  # a byte is a token here
    return [*overrides, *sizes, *SMALLER.get(recipe.stem, [])]


def test_the_promised_recipes_are_there() -> None:
    assert {"smoke", "quickstart", "sft-lora", "sft-qlora"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_it_is_and_is_valid_as_it_stands(name: str) -> None:
    assert len(first_comment(RECIPES[name])) > 20
    recipe = load_recipe(RECIPES[name])
    assert not recipe.rewrites, "shipped recipes use tunekit's own names"
    assert Path(recipe.recipe.output.dir).name == name


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_plans_and_trains_on_a_tiny_twin(name: str, twins: dict[str, str], tmp_path: Path) -> None:
    overrides = tiny_overrides(RECIPES[name], twins, tmp_path / "run")
    plan_verb(load_recipe(RECIPES[name], overrides), str(tmp_path / "plan.json"))
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["refusals"] == []
    assert plan["steps"] == STEPS

    train_verb(load_recipe(RECIPES[name], overrides), False, False)

    run = tmp_path / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert all(math.isfinite(record["loss"]) and record["supervised_tokens"] > 0 for record in steps)
    result = "model" if load_recipe(RECIPES[name]).recipe.adapter.trains_base else "adapter"
    assert [path.stat().st_size > 0 for path in (run / result).glob("*.safetensors")] == [True]
    assert json.loads((run / "plan.json").read_text())["targets"] == plan["targets"]
    assert json.loads((run / "status.json").read_text())["exit_code"] == 0
    if load_recipe(RECIPES[name]).recipe.data.eval is not None:
        assert any("eval" in record for record in records)
