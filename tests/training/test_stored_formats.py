"""Bases whose files store quantized weights train like the dense base with the same values, streamed or sharded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import write_tiny_llama
from tests.support.quantized_folders import write_folder, write_quantized
from tests.support.ranks_case import train_in_ranks
from tests.support.train_case import records, write_recipe

STEPS = ("training.epochs=null", "training.max_steps=2", "training.eval_steps=2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "world"),
    [("memory.streaming=disk", 1), ("memory.sharding=full", 2), ("memory.streaming=host", 2)],
)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_fp8_trains_like_its_dense_values(memory: str, world: int, quantization: str, tmp_path: Path) -> None:
    dense = write_tiny_llama(tmp_path / "dense", hidden=192, layers=2)
    write_folder(dense, tmp_path / "plain", write_quantized(dense, tmp_path / "fp8", "fp8-blocks"))
    for name in ("plain", "fp8"):
        recipe = write_recipe(tmp_path, tmp_path / name, rows=12)
        keys = (*STEPS, memory, f"model.quantization={quantization}")
        ends = train_in_ranks(recipe, tmp_path / f"run-{name}", *keys, world=world)
        assert [end.code for end in ends] == [0] * world, ends
    assert [len(records(tmp_path / f"run-{name}")) for name in ("plain", "fp8")] == [4, 4]
    adapters = [(tmp_path / f"run-{name}/adapter/adapter_model.safetensors").read_bytes() for name in ("plain", "fp8")]
    assert adapters[0] == adapters[1]
