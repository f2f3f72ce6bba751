"""Predicts the memory of a row (a measured run) with tunekit's simulation on the meta device, and its minimum time."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Any

import torch
from arithmetic import (
    Ceilings,
    Size,
    break_even_tokens,
    floor_seconds,
    flops_per_token,
    least_flops_per_token,
    passed_parameters,
)
from random_model import PACKERS, configuration_folder, model_section
from shapes import Row
from work import micro_batch, objective_of

from tunekit.adapters.method import load_method
from tunekit.adapters.targets import find_targets, trained_count
from tunekit.machine.memory import available_bytes
from tunekit.memory.blobs import LayerBlob, frozen_tensors
from tunekit.memory.slots import SLOTS
from tunekit.model.families import text_config
from tunekit.model.load import LoadedModel, make_meta_model
from tunekit.model.quantized import codec
from tunekit.model.quantized.weights import element_count, stored_bytes, weight_of
from tunekit.objectives.losses.logprobs import logits_chunk_tokens
from tunekit.planning.forecast import peak_bytes
from tunekit.planning.simulation import SimulatedRun
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.training import TrainingSection
from tunekit.records import ExecutionSettings

SEES_SOURCE = r"encoder\.block\.|EncDecAttention\.[kv]\."  # of a T5's parameters
CARD_BYTES = 78 * 2**30  # of an H100, where there is none to ask
SPARE_SHARE = 0.06  # for what the allocator reserves beyond tensors, and the libraries' own
HEAD_BYTES = 2  # of a parameter of the head, which is not packed
LIKELY_SHARE = 0.5  # of the product ceiling, for the expected minutes
START_SECONDS, DRAWN_BYTES_PER_SECOND = 45.0, 20e9
PACKED_PER_SECOND = 5e7  # parameters, by one of random_model.PACKERS threads


def adapter_settings(row: Row) -> LoraSettings:
    """LoRA with alpha = 2 r and no dropout."""
    targets = row.targets if row.targets == "all-linear" else tuple(row.targets.split(","))
    return LoraSettings(r=row.r, alpha=2.0 * row.r, target_modules=targets)


def training_section(row: Row) -> TrainingSection:
    """AdamW at a constant rate, clipped."""
    return TrainingSection(
        learning_rate=1e-4,
        scheduler="constant",
        warmup_ratio=0.0,
        epochs=None,
        max_steps=row.steps,
        micro_batch_size=row.rows,
        gradient_accumulation_steps=row.micro_batches,
        kernels=row.kernels,
    )


def row_execution(row: Row, vocabulary_size: int, checkpointed: int) -> ExecutionSettings:
    """The settings with which the row computes. If weights are streamed, all layers are recomputed in any case."""
    streamed = row.engine != "resident"
    return ExecutionSettings(
        logits_chunk_tokens=logits_chunk_tokens(vocabulary_size),
        checkpointed_layers=0 if streamed else checkpointed,
        streaming=row.engine if streamed else "off",
        streamed_head=row.streamed_head,
        pass_micro_batches=row.pass_size,
        mlp_tile_tokens=row.tile_tokens,
        kernels=row.kernels,
    )


@cache
def meta_base(model: str, quantization: str, device: torch.device) -> LoadedModel:
    """The model on the meta device, in the form that will run on `device`."""
    with configuration_folder(model) as folder:
        return make_meta_model(model_section(folder, quantization), device=device)


def model_size(model: str, device: torch.device) -> Size:
    """The parameters of the model, grouped by the part that multiplies with them."""
    base = meta_base(model, "none", device)
    net, family, config = base.net, base.family, text_config(base.net)
    tables = {name: net.get_submodule(name) for name in (family.head_name(net), family.embedding_name(net)) if name}
    counted = {id(module.weight): module.weight.numel() for module in tables.values()}
    head = weight_of(tables[family.head_name(net)]) if family.head_name(net) else None
    heads, hidden = int(config.num_attention_heads), int(config.hidden_size)
    width = heads * int(getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or hidden // heads)
    body, of_source = element_count(net) - sum(counted.values()), 0
    if family.reads_source:
        of_source = sum(tensor.numel() for name, tensor in net.named_parameters() if re.search(SEES_SOURCE, name))
    return Size(body, 0 if head is None else head.elements, base.facts.layers, width, of_source)


def linear_shapes(model: str, device: torch.device) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the matrices of one layer, by the end of their names."""
    base = meta_base(model, "none", device)
    _, layer = base.family.layers(base.net)[-1]
    found = {name.rpartition(".")[2]: weight_of(module) for name, module in layer.named_modules()}
    kept = {name: weight for name, weight in found.items() if weight is not None}
    return {name: (weight.shape[1], weight.shape[0]) for name, weight in kept.items()}


def layer_bytes(base: LoadedModel) -> list[int]:
    """The bytes of each layer as one block, in which every tensor starts at a multiple of 64. This block is copied over
    the bus into a slot (a layer's place on the device)."""
    return [LayerBlob(frozen_tensors(layer)).size_bytes for _, layer in base.family.layers(base.net)]


def simulated_peak(row: Row, device: torch.device, checkpointed: int) -> dict[str, int]:
    """Predicted peak bytes by part on `device`, for this number of recomputed layers. For streamed rows, the slots of
    layers are included, and the inputs of layers are on the host."""
    run_device = torch.device("cuda") if device.type != "cpu" else device
    with configuration_folder(row.model) as folder:
        section, base = model_section(folder, row.quantization), meta_base(row.model, row.quantization, device)
        choice = row_execution(row, base.text.vocabulary_size, checkpointed)
        meta = make_meta_model(section, device=run_device)
        run = SimulatedRun(meta, adapter_settings(row), objective_of(row), training_section(row), choice, run_device)
        together = 1 if row.engine == "resident" else min(row.micro_batches, row.pass_size)
        step = run.training_step(micro_batch(row, 0, 0), together)
    peak = peak_bytes(step, None, None, run_device, base.dtype)
    parts = {name: getattr(peak, name) for name in ("weights", "adapter", "optimizer", "activations", "logits")}
    return parts | {"total": peak.total}


def chosen_layers(row: Row, device: torch.device) -> tuple[int, dict[str, int]]:
    """The number of layers to recompute: the smallest number with which the step fits, as plan chooses it."""
    layers = meta_base(row.model, row.quantization, device).facts.layers
    if row.checkpointing == "every" or row.engine != "resident":
        return layers, simulated_peak(row, device, layers)
    if isinstance(row.checkpointing, int):
        return row.checkpointing, simulated_peak(row, device, row.checkpointing)
    free = CARD_BYTES
    if device.type == "cuda" and torch.cuda.is_available():
        free = available_bytes(device) or CARD_BYTES  # nothing lies there yet
    free = int(min(free, row.cap_bytes or free) * (1.0 - SPARE_SHARE))
    none = simulated_peak(row, device, 0)
    if none["total"] <= free:
        return 0, none
    every = simulated_peak(row, device, layers)
    if every["total"] > free:
        return layers, every
    share = (none["total"] - free) / max(none["total"] - every["total"], 1)  # each layer saves about as much
    count = min(layers, math.ceil(share * layers) + 1)
    found = simulated_peak(row, device, count)
    return (count, found) if found["total"] <= free else (layers, every)


def expected_minutes(row: Row, device: torch.device, ceilings: Ceilings) -> float:
    """A rough estimate of the row's minutes with loading: all layers recomputed, at half the highest speed of
    products."""
    base = meta_base(row.model, row.quantization, device)
    layers = sum(layer_bytes(base))
    minutes: float = _times(row, model_size(row.model, device), 1.0, layers, ceilings)["expected_minutes"]
    return minutes


def supervised_share(row: Row) -> float:
    """The share of supervised tokens among all tokens."""
    batch = micro_batch(row, 0, 0)
    return batch.supervised / batch.tokens


def plan_row(row: Row, device: torch.device, ceilings: Ceilings) -> dict[str, Any]:
    """All predictions for a row before it runs."""
    base, size = meta_base(row.model, row.quantization, device), model_size(row.model, device)
    blobs = layer_bytes(base)
    facts: dict[str, Any] = {
        "model": row.model,
        "architecture": base.facts.model_type,
        "parameters": base.facts.total_parameters,
        "stored_bytes": stored_bytes(base.net),
        "layers": base.facts.layers,
        "layer_bytes": max(blobs),
        "slot_bytes": min(SLOTS, len(blobs)) * max(blobs),
        "step_tokens": row.step_tokens,
        "break_even_tokens": round(break_even_tokens(sum(blobs), passed_parameters(size, row), ceilings)),
    }
    settings = adapter_settings(row)
    targets = find_targets(base.net, settings, head_name=base.family.head_name(base.net))
    facts["trained_parameters"] = trained_count(load_method("lora"), settings, targets)
    if row.tool != "tunekit":
        return facts | _times(row, size, 0.0, sum(blobs), ceilings)
    recomputed, peak = chosen_layers(row, device)
    share = recomputed / base.facts.layers
    facts |= {"checkpointed_layers": recomputed, "predicted_bytes": peak}
    return facts | _times(row, size, share, sum(blobs), ceilings)


def _times(row: Row, size: Size, share: float, layers: float, ceilings: Ceilings) -> dict[str, Any]:
    supervised = supervised_share(row)
    flops = flops_per_token(size, row, share, supervised)
    floors = floor_seconds(flops, layers, HEAD_BYTES * size.head, row, ceilings)
    least = least_flops_per_token(size, row, supervised)
    likely = max(max(floors.values()), flops * row.step_tokens / ceilings.product_flops / LIKELY_SHARE)
    drawn = 2.0 * (size.body + 2 * size.head) / DRAWN_BYTES_PER_SECOND
    if row.quantization in codec.FOUR_BIT and row.tool == "tunekit":
        drawn += size.body / (PACKED_PER_SECOND * PACKERS)
    return {
        "flops_per_token": flops,
        "limit_tokens_per_second": ceilings.product_flops / least,
        "floor_seconds": floors,
        "floor_tokens_per_second": row.step_tokens / max(floors.values()),
        "expected_minutes": (START_SECONDS + drawn + (row.steps + 1) * likely) / 60.0,
    }
