"""Builds the network for training, measurement or simulation from a loaded base and the settings that plan chose. The
order of steps is always the same. Several runs can adapt copies of one loaded base, which share its tensors."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from tunekit.adapters.attach import AttachedAdapter
from tunekit.adapters.base import Wrapper
from tunekit.adapters.kernels.liger import use_liger
from tunekit.adapters.kernels.native import use_native
from tunekit.errors import ModelError
from tunekit.machine.devices import Devices, kind_of
from tunekit.memory.offload import make_store, prepare_layers
from tunekit.memory.sharding import TIER, divided_tables, shard_base
from tunekit.memory.slots import LayerSlots
from tunekit.memory.streaming import gather_on_host, host_embedding, layer_weights, shared_slots, stream_base
from tunekit.memory.tiling import tile_layers
from tunekit.memory.vocabulary import StreamedHead, head_obstacle, stream_head
from tunekit.model.load import LoadedModel
from tunekit.model.parts import parts_apart
from tunekit.model.pretrained import config_of
from tunekit.records import ExecutionSettings
from tunekit.tuned.model import TunedModel


def prepare_network(
    base: LoadedModel,
    execution: ExecutionSettings,
    attach: Callable[[], AttachedAdapter] | None = None,
    *,
    planned_for: torch.device | None = None,
    devices: Devices | None = None,
) -> TunedModel:
    """Add the features that `execution` selects to the base's network, in this order: checkpointing, adapter, MLPs in
    tiles, faster kernels, streaming.

    `attach` attaches the adapter. The layers already have seeds and checkpointing then, because an initialisation with
    calibration data runs them. Adapted layers are replaced or moved only afterwards.
    `planned_for`: the run's device, if the base is on the meta device. `devices`: the ranks that share a sharded base.
    Raises: ModelError if an MLP cannot be computed in tiles, and the errors of `attach`.
    """
    layers, frozen = base.family.layers(base.net), layer_weights(base)
    tables = divided_tables(base) if execution.streaming == TIER else []
    modules = [layer for _, layer in layers]
    store = make_store(execution.activation_offload, planned_for or base.device, simulated=planned_for is not None)
    prepare_layers(modules, execution.checkpointed_layers, store)
    shared = None if attach is None else shared_slots(base)
    with nullcontext() if shared is None else shared.on_host():
        adapter = None if attach is None else attach()
    if execution.mlp_tile_tokens is not None:
        hidden = torch.empty(0, base.facts.hidden_size, dtype=base.dtype, device=base.device)  # (0, D)
        tile_layers(layers, execution.mlp_tile_tokens, hidden)
    if execution.kernels == "liger":
        use_liger(base.net)
    if execution.kernels == "native" and planned_for is None:
        use_native(base.net)
    if execution.streaming == TIER:
        used = [(weight, modules) for weight in tables if (modules := _plain_users(base.net, weight))]
        slots: LayerSlots | None = shard_base(base, frozen, used, execution.shares, devices)
    else:
        slots = stream_base(base, frozen, execution.streaming)
    head = _streamed_head(base, execution)
    return TunedModel(base, adapter, store, slots, execution.logits_chunk_tokens, head)


def _plain_users(net: nn.Module, weight: Tensor) -> list[nn.Module]:
    """The modules that multiply by or look up `weight`. Empty if the weight is trained or if an adapter uses it: then
    every rank keeps the whole weight."""
    users = [module for module in net.modules() if any(own is weight for own in module.parameters(recurse=False))]
    wrapped = {id(inner) for module in net.modules() if isinstance(module, Wrapper) for inner in module.modules()}
    return [] if weight.requires_grad or any(id(user) in wrapped for user in users) else users


def _streamed_head(base: LoadedModel, execution: ExecutionSettings) -> StreamedHead | None:
    """Prepare the output projection for streaming in parts; None if it is not streamed.

    Raises: ModelError if this base's output projection cannot be streamed.
    """
    if not execution.streamed_head:
        return None
    name, tier = base.family.head_name(base.net), "host" if execution.streaming == "off" else execution.streaming
    if not kind_of(base.device).own_memory:
        tier = "disk"  # it stays in its file
    head = None if name is None else base.family.head(base.net)
    obstacle = "the base has no output projection" if head is None else head_obstacle(head)
    if head is None or obstacle is not None:
        raise ModelError(str(obstacle), "write false", key="memory.streamed_head")
    embedding = host_embedding(base) if execution.streaming == "off" and base.device.type != "meta" else None
    if embedding is not None:  # otherwise layer streaming has already done this
        gather_on_host(embedding, base.device)
    return stream_head(head, base.device, tier)


def copy_modules(base: LoadedModel) -> LoadedModel:
    """Copy the base: new modules and a new configuration, but the same tensors. A run can replace and wrap modules of
    the copy, but must not change values of tensors. Copy a base before it is prepared for a run."""
    shared: dict[int, object] = {id(part): part for part in parts_apart(base.net).values()}
    for module in base.net.modules():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False), *vars(module).values())
        shared |= {id(value): value for value in own if isinstance(value, Tensor)}
    net: nn.Module = copy.deepcopy(base.net, shared)
    return replace(base, net=net, config=config_of(net))


class TensorVersions:
    """Records the versions and addresses of a base's tensors, to detect whether a run changes a tensor."""

    def __init__(self, base: LoadedModel) -> None:
        tensors = [*base.net.parameters(), *base.net.buffers()]
        self._tensors = [(tensor, tensor._version, tensor.data_ptr()) for tensor in tensors]

    def unchanged(self) -> bool:
        """Whether no tensor was changed in place or moved in memory since the start. Streamed layers always move, so
        this works only for bases that stay on the device."""
        return all(t._version == version and t.data_ptr() == pointer for t, version, pointer in self._tensors)
