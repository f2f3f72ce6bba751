"""Rows of tokens trained beside LoRA against peft: tied and untied, by the embedding alone and by module names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.peft_case import BASES, CHECKS, HEADS, IDS, SIZES, Base, close, logits_of, run_cell
from tunekit.adapters.attach import attach_adapter
from tunekit.recipe.adapters.dora import DoraSettings
from tunekit.recipe.adapters.lora import LoraSettings

IDS_IN_USE = (50, 5, 12)  # in no order; the first two are in the inputs of encoder-decoders, the last two in all
ASKED = {
    "llama": {"lm_head": (9, 4), "embed_tokens": IDS_IN_USE},
    "gpt2": {"wte": IDS_IN_USE},
    "t5": {"shared": IDS_IN_USE},
    "bart": {"shared": IDS_IN_USE},
    "bert": {"word_embeddings": IDS_IN_USE},
    "mixtral": {"lm_head": (3, 96)},
}


def cell_of(family: str, folder: Path, asked: Any, *, dora: bool = False, row: str = "") -> Any:
    names = (*BASES[family].attention, *BASES[family].feedforward)
    kind = DoraSettings if dora else LoraSettings
    settings = kind(r=4, alpha=6.0, target_modules=names, trainable_token_indices=asked)
    plain = {name: list(ids) for name, ids in asked.items()} if isinstance(asked, dict) else list(asked)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=list(names), trainable_token_indices=plain, use_dora=dora
    )
    return run_cell(settings, config, family, folder, row=row)


@pytest.mark.parametrize("family", BASES)
def test_ids_of_the_embedding(family: str, tmp_path: Path) -> None:
    cell = cell_of(family, tmp_path, IDS_IN_USE, row="lora-tokens")
    assert not cell.failures, cell.failures
    assert tuple(cell.passed) == CHECKS


@pytest.mark.parametrize("family", BASES)
def test_ids_by_module(family: str, tmp_path: Path) -> None:
    cell = cell_of(family, tmp_path, ASKED[family], dora=True, row="dora-tokens")
    assert not cell.failures, cell.failures
    assert tuple(cell.passed) == CHECKS


def make_tied_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_attention_heads=HEADS, num_key_value_heads=2, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval()


TIED = Base(make_tied_llama, "lm_head", "CAUSAL_LM", ("q_proj",), ("down_proj",), ("norm",))


@pytest.mark.parametrize(
    ("asked", "tensors"),
    [
        ({"embed_tokens": IDS_IN_USE, "lm_head": IDS_IN_USE}, 1),  # the same ids: one row for both
        ({"embed_tokens": IDS_IN_USE, "lm_head": (5, 9)}, 2),  # others: each its own, although the matrix is one
        ({"lm_head": (5, 9)}, 1),  # the head's alone
        ({"embed_tokens": IDS_IN_USE}, 1),
    ],
)
def test_tied_heads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: dict[str, Any], tensors: int) -> None:
    monkeypatch.setitem(BASES, "tied", TIED)
    cell = cell_of("tied", tmp_path, asked, row="lora-tokens")
    assert not cell.failures, cell.failures
    assert tuple(cell.passed) == CHECKS
    settings = LoraSettings(r=4, target_modules=("q_proj",), trainable_token_indices=asked)
    attached = attach_adapter(make_tied_llama(), settings, seed=0, head_name="lm_head")
    assert len([name for name in attached.trained() if "token_adapter" in name]) == tensors


def test_a_tied_head_starts_as_it_was() -> None:
    plain = logits_of(make_tied_llama(), TIED)
    settings = LoraSettings(r=4, target_modules=("q_proj",), trainable_token_indices=IDS_IN_USE)
    attached = attach_adapter(make_tied_llama(), settings, seed=0, head_name="lm_head")
    close(attached.net(input_ids=IDS).logits, plain)
