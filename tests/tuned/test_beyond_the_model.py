"""Rows and prompts that a model cannot look up: refused by name, wherever they come from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.train_case import train_in_child, write_recipe
from tunekit.errors import ModelError, Problem, RecipeError
from tunekit.evaluate import evaluate_verb
from tunekit.generate import generate_verb


@pytest.fixture
def small(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with fewer rows in its embedding than its tokenizer has tokens."""
    from transformers import LlamaForCausalLM

    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "small"
    shutil.copytree(tiny_llama, folder)
    net = LlamaForCausalLM.from_pretrained(tiny_llama)
    net.resize_token_embeddings(100)
    net.save_pretrained(folder)
    return folder


def test_ids_beyond_the_embedding(small: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "the words"}) + "\n", encoding="utf-8")
    with pytest.raises(ModelError, match=r"rows\.jsonl:1 contains the token .* embedding ends at 99"):
        evaluate_verb(str(small), None, str(rows), None, [], None, [])
    with pytest.raises(ModelError, match=r"without a row in the model's embedding of 100"):
        generate_verb(str(small), None, ["the words"], None, [])
    ended = train_in_child(write_recipe(tmp_path, small), tmp_path / "run")
    assert ended.code == 2
    assert "the model's embedding ends at 99" in ended.output


def test_rows_longer_than_a_table_of_positions(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    shutil.copytree(tiny_llama, folder)
    GPT2LMHeadModel(GPT2Config(vocab_size=264, n_embd=16, n_layer=1, n_head=2, n_positions=32)).save_pretrained(folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "x" * 40}) + "\n", encoding="utf-8")
    with pytest.raises(ModelError, match="too many for the model's 32 positions"):
        evaluate_verb(str(folder), None, str(rows), None, [], None, [])


def test_the_same_problem_is_told_once() -> None:
    same = Problem("is wrong", "mend it", "recipe.yaml", 3, "model")
    error = RecipeError.of([same, same, Problem("is wrong too")])
    assert [problem.what for problem in error.problems] == ["is wrong", "is wrong too"]
    assert str(error).count("is wrong;") == 1
