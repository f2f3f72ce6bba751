"""Chooses the tier where weights are stored during a step: device, host or disk. Also describes the cost of each
tier."""

from collections.abc import Iterator

import torch

from tunekit.errors import Problem
from tunekit.machine.devices import kind_of
from tunekit.machine.variables import has_windows_driver
from tunekit.memory.sharding import TIER
from tunekit.memory.streaming import WHERE, base_obstacle, host_obstacle, layer_bytes, rates_text
from tunekit.model.load import LoadedModel
from tunekit.model.quantized.weights import stored_bytes
from tunekit.model.storage.packed_cache import lacks_room
from tunekit.planning.prepared import Prepared, Resources
from tunekit.recipe.memory import MemorySection
from tunekit.recipe.reading.supported import HOW, SHARDING, unsharded_reason
from tunekit.recipe.recipe import Recipe
from tunekit.records import ExecutionSettings, bytes_text

KEY, HEAD_KEY = "memory.streaming", "memory.streamed_head"
# maximum share of the host's free memory that is pinned; the driver of Windows pins at most half
HOST_SHARE = 0.5 if has_windows_driver() else 0.8


def allowed_tiers(prepared: Prepared, recipe: Recipe) -> tuple[list[str], list[Problem]]:
    """The tiers (device, ranks, host, disk) that plan can choose from, fastest first; and the problems of the tier that
    the recipe requests. `recipe`: the prepared recipe with other values of some keys."""
    tiers, problems = _tiers_of_a_rank(prepared, recipe)
    written = recipe.memory.sharding
    if prepared.resources.ranks == 1 or written == "off":
        return tiers, problems
    reason = unsharded_reason(recipe) or base_obstacle(prepared.base, recipe.model)
    obstacle = None if reason is None else reason.replace("layer streaming", "sharding")
    if written == "full" and obstacle is not None:
        return tiers, [*problems, Problem(f"the base cannot be sharded: {obstacle}", HOW, key=SHARDING)]
    if written == "full":
        return [TIER], problems
    return (tiers if obstacle is not None or tiers[0] != "off" else ["off", TIER, *tiers[1:]]), problems


def _tiers_of_a_rank(prepared: Prepared, recipe: Recipe) -> tuple[list[str], list[Problem]]:
    """The tiers (device, host, disk) of a rank that stores the whole base, fastest first; and the problems of the tier
    that the recipe requests."""
    written, device = recipe.memory.streaming, prepared.resources.device
    obstacle = _streaming_obstacle(prepared, recipe) if recipe.memory.streamed_head or written != "off" else None
    if recipe.memory.streamed_head and obstacle is not None:
        what = f"the output projection cannot be streamed: {obstacle}"
        return ["off"], [Problem(what, f"set {HEAD_KEY} to false", key=HEAD_KEY)]
    if written == "off" or recipe.adapter.trains_base:
        return ["off"], []
    in_the_way = host_obstacle(device) if written == "host" else None
    if in_the_way is not None:
        how = "set memory.streaming to off, or to disk if the base is larger than the memory"
        return ["off"], [Problem(in_the_way, how, key=KEY)]
    if obstacle is not None and written != "auto":
        what = f"weights cannot be streamed from {written}: {obstacle}"
        return ["off"], [Problem(what, "set memory.streaming to off or auto", key=KEY)]
    if obstacle is not None:
        return ["off"], []
    room, here = prepared.resources.host_bytes, prepared.resources.ranks_here
    needed = here * layer_bytes(prepared.base)
    if written == "host" and room is not None and needed > room:
        ranks = f" ({here} ranks, each with all layers)" if here > 1 else ""
        what = f"layers take {bytes_text(needed)} of host memory{ranks}, but only {bytes_text(room)} are free"
        return [written], [Problem(what, "set memory.streaming to disk", key=KEY)]
    if written != "auto":
        return [written], []
    fits = kind_of(device).own_memory and (room is None or needed < HOST_SHARE * room)
    return (["off", "host", "disk"] if fits else ["off", "disk"]), []


def _streaming_obstacle(prepared: Prepared, recipe: Recipe) -> str | None:
    """The reason why this base's weights cannot be streamed; None if they can be."""
    of_companions = (companion.streaming_obstacle for companion in prepared.companions.values())
    for obstacle in (base_obstacle(prepared.base, recipe.model), *of_companions):
        if obstacle:
            return obstacle
    if recipe.adapter.needs_base_first and prepared.resources.device.type != "cpu":
        return "the adapter's initialisation needs the whole base on the device at once"
    return None


def weight_notes(
    memory: MemorySection, base: LoadedModel, resources: Resources, execution: ExecutionSettings, tokens: int
) -> Iterator[str]:
    """Notes about a run whose weights are streamed or divided among ranks, and about its speed. `tokens`: the tokens of
    a micro-batch, padding included."""
    stored, from_cache = stored_bytes(base.net), base.packed_while_read or base.copied_while_read
    if execution.streaming != "off" and from_cache and lacks_room(stored, resources.cache_bytes):
        yield (
            f"warning: weights are streamed from a cache file of {bytes_text(stored)}, but the cache folder is full or "
            "cannot be written; unless the file exists, free disk space, or set TUNEKIT_CACHE to another folder"
        )
    if execution.streaming == TIER:
        yield from _sharding_notes(base, execution)
    elif memory.sharding == "full":
        yield "memory.sharding: full has no effect, because the run has one process"
    if execution.streaming in ("off", TIER):
        return
    size, count = layer_bytes(base), execution.pass_micro_batches
    together = "one micro-batch passes" if count == 1 else f"{count:,} micro-batches pass"
    yield (
        f"streamed: {bytes_text(size)} of layers are stored {WHERE[execution.streaming]}; {together} through each "
        "layer before the next layer is loaded, and the backward pass recomputes every layer"
    )
    rates = rates_text(execution.streaming, count * tokens, size, copies=2)
    yield (
        f"speed of streaming: each pass of up to {count * tokens:,} tokens copies all layers twice. This limits tokens "
        f"per second to {rates} (published bandwidths). A device that computes more slowly does not wait for copies"
    )
    if execution.streaming == "host" and resources.device.type == "cpu":
        yield "memory.streaming: host saves nothing on a CPU, because host and device share one memory"


def _sharding_notes(base: LoadedModel, execution: ExecutionSettings) -> Iterator[str]:
    """Notes about a run whose base is divided among ranks."""
    share, count = stored_bytes(base.net) // execution.shares, execution.pass_micro_batches
    together = "one micro-batch passes" if count == 1 else f"{count:,} micro-batches pass"
    yield (
        f"sharded: each of the {execution.shares} ranks stores {bytes_text(share)} of the base; a layer is gathered "
        f"from all ranks before it is computed; {together} through each layer before the next layer is gathered, and "
        "the backward pass recomputes every layer"
    )
    if execution.sampling_batch_size:
        yield "sampling is slow with a sharded base: each token gathers all layers"


def activation_notes(memory: MemorySection, device: torch.device, layers: int, offloaded_bytes: int) -> Iterator[str]:
    """Notes about offloaded activations and about MLPs that are computed in tiles.

    `layers`: the number of recomputed layers. `offloaded_bytes`: the bytes of pinned host memory.
    """
    if offloaded_bytes:
        yield f"the inputs of recomputed layers are offloaded to {bytes_text(offloaded_bytes)} of pinned host memory"
    elif memory.activation_offload is True and layers < 2:
        yield "no inputs of layers are offloaded, because fewer than two layers are recomputed"
    elif memory.activation_offload is True and not kind_of(device).own_memory:
        yield "offloading the inputs of recomputed layers saves nothing, because host and device share one memory"
    if memory.mlp_tile_tokens is not None:
        yield (
            f"MLPs and norms compute {memory.mlp_tile_tokens:,} tokens at a time: the order of sums in gradients and "
            "the dropout masks in MLPs differ from a run without tiles"
        )
