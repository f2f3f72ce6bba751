"""Prefix tuning and LLaMA-Adapter through recipes alone: plan, its refusals, train, eval, generate and merge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from tests.support.plans import make_plan
from tests.support.train_case import records, train_in_child, write_recipe
from tunekit.errors import AdapterError, TunekitError
from tunekit.evaluate import evaluate_verb
from tunekit.machine.devices import make_devices
from tunekit.merge import merge_verb
from tunekit.model.text.generation import generate_texts
from tunekit.recipe.load import load_recipe
from tunekit.targets.target import find_target, load_target

ADAPTERS: dict[str, dict[str, Any]] = {
    "prefix": {"method": "prefix", "num_virtual_tokens": 12},
    "projection": {"method": "prefix", "num_virtual_tokens": 12, "prefix_projection": True},
    "llama_adapter": {"method": "llama_adapter", "adapter_len": 6, "adapter_layers": 1},
}
TRAINING = {
    "learning_rate": 0.05,
    "scheduler": "constant",
    "warmup_steps": 0,
    "warmup_ratio": None,
    "epochs": None,
    "max_steps": 4,
    "micro_batch_size": 3,
    "gradient_accumulation_steps": 2,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))


def recipe_of(folder: Path, model: Path, name: str, **sections: Any) -> Path:
    path = write_recipe(folder, model, rows=10, training=TRAINING, **sections)
    values = json.loads(path.read_text()) | {"adapter": ADAPTERS[name]}  # nothing of the LoRA that is written there
    values["training"] = {key: value for key, value in values["training"].items() if value is not None}
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_recipe_from_train_to_an_answer(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tiny_llama, name, memory={"gradient_checkpointing": True})
    last = {}
    for run, rate in (("still", 0.0), ("run", 0.05)):
        ended = train_in_child(recipe, tmp_path / run, f"training.learning_rate={rate}")
        assert ended.code == 0, ended.output
        last[run] = [entry["loss"] for entry in records(tmp_path / run) if "loss" in entry][-1]
    assert last["run"] < last["still"]
    moved, place = tmp_path / "elsewhere" / "adapter", tmp_path / "values.json"
    shutil.copytree(tmp_path / "run" / "adapter", moved)
    evaluate_verb(str(moved), str(tiny_llama), str(tmp_path / "train.jsonl"), None, [], str(place), [])
    evaluated = json.loads(place.read_text())["loss"]
    evaluate_verb(str(tiny_llama), None, str(tmp_path / "train.jsonl"), None, [], str(place), [])
    assert evaluated < json.loads(place.read_text())["loss"] - 0.005
    answers(moved, tiny_llama)
    with pytest.raises(AdapterError, match="cannot be merged"):
        merge_verb(str(moved), str(tmp_path / "merged"), str(tiny_llama), None, [])


def answers(adapter: Path, base: Path) -> None:
    """Greedy answers with a cache, in one padded batch, are those of plain forwards over whole rows."""
    loaded = load_target(find_target(str(adapter), str(base), []), make_devices().device)
    assert loaded.model.adapter is not None
    prompts = [[10, 11, 12, 13, 14, 15, 16], [30, 31, 32]]
    produced = generate_texts(
        loaded.model.base,
        loaded.tokenizer,
        prompts,
        max_new_tokens=6,
        batch_size=2,
        stop_ids=(),
        adapt=loaded.model.adapt_inputs,
        virtual_tokens=loaded.model.adapter.virtual_tokens,
    )
    for prompt, new in zip(prompts, produced, strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                net: Any = loaded.model.base.net
                ids.append(int(net(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert ids[len(prompt) :] == new


def problems_of(recipe: Path, *overrides: str) -> str:
    """What plan refuses, as lines."""
    try:
        plan, _ = make_plan(load_recipe(recipe, list(overrides)), device=torch.device("cpu"))
    except TunekitError as error:
        return str(error)
    return "\n".join(f"{refusal.key}: {refusal.message}" for refusal in plan.refusals)


@pytest.mark.parametrize("name", ADAPTERS)
def test_plan_counts_and_refuses(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tiny_llama, name)
    plan, _ = make_plan(load_recipe(recipe), device=torch.device("cpu"))
    # 2 layers of 2 key heads of width 16; width 64
    counts = {"prefix": 12 * 128, "projection": 12 * 32 + 33 * 32 + 33 * 128, "llama_adapter": 6 * 64 + 1}
    assert plan.trainable_parameters == counts[name]
    assert plan.refusals == []
    assert ("adapter puts virtual tokens" in problems_of(recipe, "data.packing=true")) == (name != "llama_adapter")


def test_bases_that_keys_cannot_be_put_into_are_refused_at_their_line(tiny_llama: Path, tmp_path: Path) -> None:
    BloomForCausalLM(BloomConfig(vocab_size=270, hidden_size=32, n_layer=2, n_head=4)).save_pretrained(tmp_path / "b")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "b")
    recipe = recipe_of(tmp_path / "prefix", tmp_path / "b", "prefix")
    assert "its positions are an attention bias of fixed size" in problems_of(recipe)
    recipe = recipe_of(tmp_path / "llama_adapter", tmp_path / "b", "llama_adapter")
    assert "bloom has no LLaMA-Adapter: PEFT defines it for llama, mistral, gpt2" in problems_of(recipe)
    assert "5 layers are requested, but the base has 2" in problems_of(
        recipe, f"model.name_or_path={tiny_llama}", "adapter.adapter_layers=5"
    )


def test_the_prefix_counts_among_learned_positions(tiny_llama: Path, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=270, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "gpt2")
    recipe = recipe_of(tmp_path, tmp_path / "gpt2", "prefix")
    assert "too many for the model" not in problems_of(recipe, "adapter.num_virtual_tokens=2", "data.max_length=60")
    assert "too many for the model" in problems_of(recipe, "adapter.num_virtual_tokens=40", "data.max_length=60")


def test_a_prefix_continues_from_a_folder(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tiny_llama, "prefix")
    ended = train_in_child(recipe, tmp_path / "first")
    assert ended.code == 0, ended.output
    ended = train_in_child(recipe, tmp_path / "second", f"adapter.init_from={tmp_path / 'first' / 'adapter'}")
    assert ended.code == 0, ended.output
    first, second = ([e["loss"] for e in records(tmp_path / run) if "loss" in e] for run in ("first", "second"))
    assert second[0] < first[0]
