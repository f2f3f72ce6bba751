"""A base that was never trained on the token with which answers end: plan names it, and what trains it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.plans import make_plan
from tests.support.train_case import write_recipe
from tunekit.recipe.load import load_recipe

END = 2  # <|im_end|>
CURE = re.compile(r"write (adapter\.trainable_token_indices): (\S.*), or choose another end")


def write_untrained(base: Path, folder: Path, *, tied: bool) -> Path:
    """The base with the row of its end of turn at the mean of the head's rows."""
    net = AutoModelForCausalLM.from_pretrained(base)
    net.config.tie_word_embeddings = tied
    if tied:
        net.tie_weights()
    with torch.no_grad():
        weight = net.lm_head.weight
        weight[END] = weight.mean(0)
    net.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def notes_of(recipe: Path, *overrides: str) -> list[str]:
    plan, _ = make_plan(load_recipe(recipe, overrides), device=torch.device("cpu"))
    assert not plan.refusals
    return [note for note in plan.notes if "never trained" in note]


@pytest.mark.parametrize("tied", [False, True])
def test_plan_names_an_untrained_end_and_its_cure(tmp_path: Path, tiny_llama: Path, tied: bool) -> None:
    recipe = write_recipe(tmp_path / "recipe", write_untrained(tiny_llama, tmp_path / "base", tied=tied))
    (note,) = notes_of(recipe)
    assert "answers end with '<|im_end|>' (id 2), but the base was never trained on this token" in note
    cure = CURE.search(note)
    assert cure is not None
    assert ("embed_tokens" in cure[2]) == (not tied)
    assert notes_of(recipe, f"{cure[1]}={cure[2]}") == []
    assert notes_of(recipe, "adapter.method=full", "~adapter.r", "~adapter.dropout") == []
    assert notes_of(recipe, "adapter.modules_to_save=[lm_head]" if not tied else f"{cure[1]}={cure[2]}") == []


def test_plan_says_nothing_of_a_trained_end(tmp_path: Path, tiny_llama: Path) -> None:
    assert notes_of(write_recipe(tmp_path / "recipe", tiny_llama)) == []


def test_plan_warns_of_a_far_smaller_vocabulary(tmp_path: Path, tiny_llama: Path) -> None:
    net = AutoModelForCausalLM.from_pretrained(tiny_llama)
    size = len(AutoTokenizer.from_pretrained(tiny_llama))
    net.resize_token_embeddings(3 * size)
    net.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "base")
    plan, _ = make_plan(load_recipe(write_recipe(tmp_path / "recipe", tmp_path / "base")), device=torch.device("cpu"))
    what = (
        f"warning: the tokenizer has {size:,} tokens, but the base has {3 * size:,}; check that the tokenizer's files"
    )
    assert [note for note in plan.notes if note.startswith(what)]
