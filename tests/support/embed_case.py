"""Small encoders, and folders of sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from tests.support.train_case import write_sections

ROWS = 23


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


def example_of(number: int) -> dict[str, Any]:
    query, document = f"what is {'very ' * (number % 4)}{number}", f"it is {'so ' * (number % 3)}{number} here"
    return {"query": query, "document": document} | ({"negative": f"nobody knows {number}"} if number % 2 else {})


def write_case(folder: Path, base: Path, objective: dict[str, Any] | None = None, **sections: Any) -> Path:
    """A recipe over rows of different lengths, and with different numbers of negatives."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(example_of(number)) + "\n" for number in range(ROWS))
    (folder / "train.jsonl").write_text(lines, encoding="utf-8")
    values: dict[str, Any] = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "data": {"train": [{"path": "train.jsonl"}], "eval": 0.2, "max_length": 64},
        "adapter": {"method": "lora", "r": 4, "dropout": 0.0},
        "objective": {"method": "embed", **(objective or {})},
        "training": {"learning_rate": 0.01, "micro_batch_size": 2, "gradient_accumulation_steps": 4, "epochs": 2.0},
        "output": {"dir": "run"},
    }
    return write_sections(folder, values, sections)
