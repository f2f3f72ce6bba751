"""Layer streaming: the base's layers are stored outside of the device. Each layer is copied into a slot on the device
before it is computed. Also upper bounds for the speed of streamed layers, from published bandwidths."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from tunekit.machine.devices import kind_of
from tunekit.machine.placing import on_host, to_device
from tunekit.memory.blobs import LayerBlob, align, frozen_tensors
from tunekit.memory.copies import Copier, StreamCopier, ThreadCopier
from tunekit.memory.slots import LayerSlots
from tunekit.model.load import LoadedModel
from tunekit.model.quantized.weights import stored_bytes
from tunekit.model.storage.source import find_source
from tunekit.recipe.model import ModelSection


def make_slots(
    tensors: Sequence[Sequence[Tensor]],
    device: torch.device,
    *,
    tier: str,
    mapped: frozenset[int] = frozenset(),
    poison: bool = False,
) -> LayerSlots:
    """Make the device slots for layers with these frozen tensors. `tier`: where layers are stored while they are not on
    the device: `host` (memory) or `disk` (their files).

    `mapped`: memory addresses of tensors that are views of read-only mapped files; their pages are released after a
    copy.
    """
    blobs, copier = [LayerBlob(layer) for layer in tensors], _make_copier(device, mapped)
    if tier == "host":
        sizes = [blob.size_bytes for blob in blobs]
        for blob, memory in zip(blobs, host_memory(copier, sizes), strict=True):
            blob.gather(memory, mapped)
            blob.unbind(device)  # so that only one layer at a time is in memory twice
    return LayerSlots(blobs, copier, device, poison=poison)


def host_memory(copier: Copier, sizes: Sequence[int]) -> Iterator[Tensor]:
    """Allocate host memory (bytes,) uint8 for each of these sizes.

    torch rounds pinned memory up to powers of two. Therefore several layers share blocks whose sizes are powers of two,
    and each block wastes less than one layer.
    """
    if not isinstance(copier, StreamCopier):
        yield from (copier.memory(size, on_host=True) for size in sizes)
        return
    arena, start = copier.memory(0, on_host=True), 0
    for number, size in enumerate(sizes):
        if start + size > arena.numel():
            arena, start = copier.memory(arena_bytes(sizes[number:]), on_host=True), 0
        yield arena[start : start + size]
        start += align(size)


def arena_bytes(sizes: Sequence[int]) -> int:
    """The largest power of two that memory of these sizes can fill completely. The result is at least the first
    size."""
    return 1 << max(sum(map(align, sizes)).bit_length() - 1, (sizes[0] - 1).bit_length())


def _make_copier(device: torch.device, mapped: frozenset[int]) -> Copier:
    if kind_of(device).own_memory:
        return StreamCopier(device, mapped)
    return ThreadCopier(device, mapped) if device.type == "cpu" else Copier(device, mapped)


def stream_layers(layers: Sequence[nn.Module], slots: LayerSlots) -> None:
    """Make each layer load itself into a slot when it is called (evaluation, generation, probes). If the training
    engine has already loaded the layer, the call only runs it."""
    for number, layer in enumerate(layers):
        layer.forward = _in_slot(layer.forward, number, (number + 1) % len(layers), slots)


def gather_on_host(embedding: nn.Module, device: torch.device) -> None:
    """Keep a token embedding on the host. Only the embeddings of a batch's ids are sent to the device.

    Shapes: ids (B, T) on the device or elsewhere -> (B, T, D) on the device.
    """
    embedding.to("cpu")
    plain = embedding.forward

    def gathered(ids: Tensor) -> Tensor:
        rows: Tensor = plain(on_host(ids))  # (B, T, D)
        return to_device(rows, device)

    embedding.forward = gathered


def _in_slot(forward: Callable[..., object], number: int, then: int, slots: LayerSlots) -> Callable[..., object]:
    def run(*inputs: object, **named: object) -> object:
        with slots.holding(number, then):
            return forward(*inputs, **named)

    return run


def base_obstacle(base: LoadedModel, section: ModelSection) -> str | None:
    """The reason why the layers of this base can never be streamed; None if they can be. `base`: from
    make_meta_model."""
    if base.family.stages(base.net) is None:
        return f"tunekit has not tested {base.facts.model_type} with layer streaming"
    if section.trust_remote_code:
        return "a base with remote code can only be loaded by transformers, not layer by layer"
    if base.read_alone:
        return None
    if find_source(section, weights=False).gguf_file is not None:
        return f"in a GGUF file, the tensors of {base.facts.model_type} do not match the network's tensors one to one"
    return f"the weights of {base.facts.name_or_path} have other names or shapes than the net's parameters"


def host_obstacle(device: torch.device) -> str | None:
    """The reason why streamed layers cannot be stored in host memory for this device; None if they can be."""
    if device.type == "cpu" or kind_of(device).own_memory:
        return None
    return f"{device.type} shares the host's memory, so layers would be in memory twice"


def layer_weights(base: LoadedModel) -> list[list[Tensor]]:
    """The frozen tensors of each layer. Call this function before an adapter is attached."""
    return [frozen_tensors(layer) for _, layer in base.family.layers(base.net)]


def shared_slots(base: LoadedModel) -> LayerSlots | None:
    """The device slots that several runs share over one streamed base; None if there are none."""
    return base.slots if isinstance(base.slots, LayerSlots) else None


def stream_base(base: LoadedModel, weights: Sequence[Sequence[Tensor]], tier: str) -> LayerSlots | None:
    """Stream the base's layers from `tier`: `host` (memory) or `disk` (files). Returns their device slots; None if the
    tier is `off`."""
    if tier == "off":
        return None
    simulated = base.device.type == "meta"  # tensors on the meta device need no host memory
    tier = "disk" if simulated else tier
    slots = shared_slots(base) or make_slots(weights, base.device, tier=tier, mapped=base.mapped)
    embedding = None if simulated else host_embedding(base)
    if embedding is not None:
        gather_on_host(embedding, base.device)
    stream_layers([layer for _, layer in base.family.layers(base.net)], slots)
    return slots


def host_embedding(base: LoadedModel) -> nn.Module | None:
    """The token embedding, if it stays in host memory because the base is streamed. None otherwise, for example if it
    is tied to the head."""
    name = base.family.embedding_name(base.net)
    several = base.family.reads_source  # each of the two stacks looks up ids in its own module
    if base.device.type == "cpu" or name is None or several or base.family.tied(base.net):
        return None
    embedding = base.net.get_submodule(name)
    return embedding if isinstance(embedding, nn.Embedding) else None


# Bytes per second of the links that a tier's copies pass: 16 PCIe lanes, less a fifth for the protocol; and NVMe
# drives of each generation at their sequential read speed.
BANDWIDTHS = {
    "host": {"PCIe 3": 12e9, "PCIe 4": 25e9, "PCIe 5": 52e9},
    "disk": {"NVMe of PCIe 3": 3.5e9, "NVMe of PCIe 4": 7e9, "NVMe of PCIe 5": 12e9},
}
WHERE = {"host": "in the host's memory", "disk": "in mapped files"}


def layer_bytes(base: LoadedModel) -> int:
    """Stored bytes of all layers."""
    return sum(stored_bytes(layer) for _, layer in base.family.layers(base.net))


def rates_text(tier: str, tokens: int, layers_bytes: int, copies: int) -> str:
    """The maximum number of tokens per second for each kind of link (PCIe 4, ...), as text. `tier`: where the layers
    are stored, host or disk."""
    return ", ".join(
        f"{max_tokens_per_second(tokens, layers_bytes, bandwidth, copies):,.0f} over {link}"
        for link, bandwidth in BANDWIDTHS[tier].items()
    )


def max_tokens_per_second(tokens: int, layers_bytes: int, bytes_per_second: float, copies: int = 2) -> float:
    """The maximum speed of a pass whose layers are copied to the device: tokens divided by the time of the copies.
    `copies`: how often a pass copies each layer."""
    return bytes_per_second * tokens / (copies * max(layers_bytes, 1))
