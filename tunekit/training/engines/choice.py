"""Which engine runs the windows of a run: the plan's word for where the base's weights wait decides.

Comes in: the base, or its slots.  Goes out: an Engine.  Next: train.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tunekit.contracts import Engine
from tunekit.memory.blobs import frozen_tensors
from tunekit.memory.slots import LayerSlots
from tunekit.memory.splitting import Splitting
from tunekit.memory.streaming import StreamingEngine, gather_on_host, make_slots, stream_layers
from tunekit.model.load import LoadedModel
from tunekit.training.engines.resident import ResidentEngine


def make_engine(
    seed: int, slots: LayerSlots | None, pass_micro_batches: int, splitting: Splitting | None = None
) -> Engine:
    """Layer by layer where there are slots, else micro-batch by micro-batch."""
    if slots is None:
        return ResidentEngine(seed, splitting)
    return StreamingEngine(seed, slots, pass_micro_batches, splitting)


def layer_weights(base: LoadedModel) -> list[list[Tensor]]:
    """The frozen tensors of each layer; asked for before an adapter is put into it."""
    return [frozen_tensors(layer) for _, layer in base.family.layers(base.net)]


def stream_base(base: LoadedModel, weights: Sequence[Sequence[Tensor]], tier: str) -> LayerSlots | None:
    """Let the layers pass through slots from now on, as the tier says; None where it is off."""
    if tier == "off":
        return None
    slots = make_slots(weights, base.device, tier=tier, mapped=base.mapped)
    embedding = host_embedding(base)
    if embedding is not None:
        gather_on_host(embedding, base.device)
    stream_layers([layer for _, layer in base.family.layers(base.net)], slots)
    return slots


def host_embedding(base: LoadedModel) -> nn.Module | None:
    """The token embedding, where a streamed base keeps it on a GPU's host: neither the head's matrix nor adapted."""
    name = base.family.embedding_name(base.net)
    several = base.family.reads_source  # each of two stacks then looks up in a module of its own
    if base.device.type == "cpu" or name is None or several or base.family.tied(base.net):
        return None
    embedding = base.net.get_submodule(name)
    return embedding if isinstance(embedding, nn.Embedding) else None
