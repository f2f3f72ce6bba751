"""Measures the CPU time of one packed micro-batch, forward and backward: with a dense mask or one document at a time,
and with LoRA layer by layer or in groups.

    scripts/bench/run step --model FOLDER [--dtype bfloat16] [--tokens 2048] [--repeats 3] [--json FILE]

One thread, CPU time of the process, variants in turns, the minimum of the repeats.  Rows: lengths log-normal, median
180 tokens, half of each supervised; random ids.  Losses are printed: they must agree up to rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tunekit.adapters.attach import attach_adapter
from tunekit.adapters.kernels.joined_lora import GatedMlp
from tunekit.contracts import Batch, Objective, Row, StepBatches
from tunekit.model.load import load_model
from tunekit.objectives.base import make_objective
from tunekit.objectives.rows.sequences import sequence_parts
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.model import ModelSection
from tunekit.recipe.objectives.sft import SftSettings
from tunekit.training.engine import Engine, StepWork
from tunekit.tuned.model import TunedModel

MEDIAN_TOKENS, SPREAD, SHORTEST = 180, 0.6, 16
VARIANTS = {
    "dense mask": ("sdpa", False),
    "documents": ("sdpa_per_document", False),
    "documents, groups": ("sdpa_per_document", True),
    "products, groups": ("products_per_document", True),
}


def packed_batch(tokens: int, vocabulary: int, objective: Objective) -> Batch:
    """One row of documents, `tokens` long."""
    draw, left = np.random.default_rng(0), tokens
    rows: list[Row] = []
    while left >= SHORTEST:
        length = min(left, max(SHORTEST, int(draw.lognormal(np.log(MEDIAN_TOKENS), SPREAD))))
        ids = draw.integers(0, vocabulary, length).astype(np.int32)
        parts = sequence_parts(ids, np.arange(length) >= length // 2)
        rows.append(objective.rows.make_row(parts, f"row {len(rows)}"))
        left -= length
    return objective.rows.collate([rows])


class Switch:
    """Turns both techniques (documents one at a time, LoRA in groups) on and off in a model."""

    def __init__(self, model: TunedModel) -> None:
        assert model.adapter is not None
        self.net: Any = model.base.net
        self.joined: dict[Any, Any] = {layer: layer.fused for layer in model.adapter.layers.values()}
        self.gated = {
            module: module.__dict__["forward"]
            for module in self.net.modules()
            if isinstance(module.__dict__.get("forward"), GatedMlp)
        }

    def choose(self, attention: str, groups: bool) -> None:
        """Compute this way from now on."""
        self.net.config._attn_implementation = attention
        for layer, fused in self.joined.items():
            layer.fused = fused if groups else None
        for module, forward in self.gated.items():
            module.__dict__.pop("forward", None)
            if groups:
                module.forward = forward


def measure(model: TunedModel, objective: Objective, batch: Batch, repeats: int) -> dict[str, dict[str, float]]:
    """CPU seconds and loss of each variant."""
    switch = Switch(model)
    step, units = StepBatches(0, 0.0, (0,), (batch,)), objective.loss.units(batch)
    found: dict[str, dict[str, float]] = {}
    with model.training_mode(True):
        for _ in range(repeats):
            for name, (attention, groups) in VARIANTS.items():
                switch.choose(attention, groups)
                started = time.process_time()
                [result] = Engine().run([StepWork(model, objective, step, units, 0)])
                seconds = min(time.process_time() - started, found.get(name, {}).get("seconds", float("inf")))
                found[name] = {
                    "seconds": seconds,
                    "loss": float(result.checked().total),
                    "tokens_per_second": batch.tokens / seconds,
                }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    base = load_model(ModelSection(name_or_path=settings.model, dtype=settings.dtype), device=torch.device("cpu"))
    adapter = attach_adapter(base.net, LoraSettings(), seed=0, head_name=base.family.head_name(base.net))
    for parameter in adapter.trained().values():
        parameter.grad = torch.zeros_like(parameter)
    ids_only: Any = SimpleNamespace(pad_id=0, fingerprint="random ids")
    objective = make_objective(SftSettings(), ids_only)
    batch = packed_batch(settings.tokens, base.text.vocabulary_size, objective)
    result: dict[str, Any] = {
        "variants": measure(TunedModel(base, adapter), objective, batch, settings.repeats),
        "tokens": batch.tokens,
        "documents": len(batch.rows),
        "dtype": settings.dtype,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "load": os.getloadavg(),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if settings.json:
        Path(settings.json).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
