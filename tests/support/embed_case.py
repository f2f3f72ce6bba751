"""Small encoders, and folders of sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertModel


def write_bert(folder: Path, llama: Path, dropout: float) -> Path:
    """A random encoder with a pooler, with the tiny llama's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    BertModel(BertConfig(vocab_size=len(tokenizer) + 5, **sizes, **drops)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_newer_schema(folder: Path) -> None:
    """The modules as sentence-transformers has written them since version 5.4."""
    package = "sentence_transformers"
    types = [
        f"{package}.base.modules.transformer.Transformer",
        f"{package}.sentence_transformer.modules.pooling.Pooling",
    ]
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": kind}
        for number, (path, kind) in enumerate(zip(["", "1_Pooling"], types, strict=True))
    ]
    (folder / "1_Pooling").mkdir()
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": {"embedding_dimension": 32, "pooling_mode": "cls", "include_prompt": True},
        "config_sentence_transformers.json": {"prompts": {"query": "find: ", "document": ""}},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
