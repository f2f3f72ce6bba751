"""Where the base's weights may wait, and what streaming them costs on this machine.

Comes in: the recipe, the model without weights, the device.  Goes out: tiers that plan may choose from, break-even
tokens, notes.  Next: planned_memory.py, plan.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from tunekit.errors import ModelError, Problem
from tunekit.machine.memory import available_bytes
from tunekit.model.load import LoadedModel
from tunekit.model.quantized.weights import element_count, stored_bytes
from tunekit.model.storage.shards import shard_files
from tunekit.model.storage.source import find_source
from tunekit.planning.choice import break_even_tokens
from tunekit.planning.rates import Rates, measure_rates
from tunekit.recipe.model import ModelSection
from tunekit.recipe.recipe import Recipe
from tunekit.recipe.section import CalibratedStart
from tunekit.records import Choice, bytes_text

KEY = "memory.streaming"
HOST_SHARE = 0.8  # of the free memory of the host, that the base's layers may take there


def streaming_obstacle(recipe: Recipe, base: LoadedModel, device: torch.device) -> str | None:
    """Why this base's weights cannot be streamed, or None."""
    kind = base.facts.model_type
    if base.family.stages(base.net) is None:
        return f"{kind} is not known to compute the same layer by layer"
    if find_source(recipe.model, weights=False).gguf_file is not None:
        return "a GGUF file holds no tensors of the net's names"
    if recipe.model.trust_remote_code:
        return "a base with code of its own is read by transformers alone"
    looks = isinstance(getattr(recipe.adapter, "start", None), CalibratedStart)
    looks = looks or getattr(recipe.adapter, "first_values", None) == "text"  # a prefix of a text
    if looks and device.type != "cpu":
        return "the adapter's start computes with the whole base on the device"
    if recipe.training.compile is True:
        return "training.compile compiles layers that stay where they are"
    return None


def allowed_tiers(recipe: Recipe, base: LoadedModel, device: torch.device) -> tuple[list[str], list[Problem]]:
    """The tiers among which plan may choose, fastest first; and what is wrong with the one that is written."""
    written = recipe.memory.streaming
    if written == "off":
        return ["off"], []
    obstacle = streaming_obstacle(recipe, base, device)
    if written != "auto":
        if obstacle is None:
            return [written], []
        return ["off"], [Problem(f"weights cannot wait on {written}: {obstacle}", "write off or auto", key=KEY)]
    if obstacle is not None:
        return ["off"], []
    if device.type == "cpu":
        return ["off", "disk"], []
    room = available_bytes(torch.device("cpu"))
    fits = room is None or layer_bytes(base) < HOST_SHARE * room
    return (["off", "host", "disk"] if fits else ["off", "disk"]), []


def layer_bytes(base: LoadedModel) -> int:
    """Bytes of all layers as they are stored."""
    return sum(stored_bytes(layer) for _, layer in base.family.layers(base.net))


def tier_rates(section: ModelSection, base: LoadedModel, device: torch.device, tier: str) -> Rates:
    """Products and copies from this tier, measured now; each once in a process."""
    return _rates(section.model_dump_json(), section, base.dtype, base.facts.hidden_size, device, tier)


_measured: dict[tuple[str, str], Rates] = {}


def _rates(key: str, section: ModelSection, dtype: torch.dtype, width: int, device: torch.device, tier: str) -> Rates:
    if (key, tier) not in _measured:
        file = _first_file(section) if tier == "disk" else None
        _measured[key, tier] = measure_rates(device, dtype, width, file)
    return _measured[key, tier]


def _first_file(section: ModelSection) -> Path | None:
    """One of the base's files; None where it is not on this machine yet."""
    try:
        folder = Path(find_source(section, weights=False).folder)
        return folder / shard_files(folder)[0]
    except (ModelError, OSError):
        return None


def tier_break_even(section: ModelSection, base: LoadedModel, device: torch.device, tier: str) -> float:
    """Tokens of a pass that hide the copies of the weights: T* = b F / (3 BW)."""
    rates = tier_rates(section, base, device, tier)
    return break_even_tokens(_bytes_per_parameter(base), rates.flops, rates.copied_bytes)


def _bytes_per_parameter(base: LoadedModel) -> float:
    layers = [layer for _, layer in base.family.layers(base.net)]
    return layer_bytes(base) / max(1, sum(element_count(layer) for layer in layers))


def streaming_notes(
    recipe: Recipe, base: LoadedModel, device: torch.device, choice: Choice, tokens: int
) -> Iterator[str]:
    """How a streamed run goes about it, and how fast it can be. `tokens`: of a micro-batch, padding included."""
    if choice.streaming == "off":
        return
    where = {"host": "in the host's memory", "disk": "in mapped files"}[choice.streaming]
    rates = tier_rates(recipe.model, base, device, choice.streaming)
    needed = tier_break_even(recipe.model, base, device, choice.streaming)
    passed = choice.pass_micro_batches * tokens
    count = choice.pass_micro_batches
    together = "one micro-batch passes" if count == 1 else f"{count:,} micro-batches pass"
    yield (
        f"streamed: {bytes_text(layer_bytes(base))} of layers wait {where}; {together} a layer before the next, and "
        "every layer is computed again in the backward pass"
    )
    text = (
        f"break-even of streaming: about {needed:,.0f} tokens a pass (products at {rates.flops / 1e9:,.0f} GFLOP/s, "
        f"copies at {rates.copied_bytes / 1e9:,.1f} GB/s, measured just now); a pass here has up to {passed:,}"
    )
    if passed >= needed:
        yield f"{text}: copies hide behind the computation"
    else:
        yield f"{text}: about {needed / passed:.1f} times as slow as with weights in place"
    if choice.streaming == "host" and device.type == "cpu":
        yield "memory.streaming: host saves nothing on a CPU, where the host's memory is the device's"
