"""A loaded base and what plan chose go in; the network that is trained, measured or simulated comes out, put together
in one order. Its decoder layers are compiled here too, where plan says that it pays.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from tunekit.adapters.attach import AttachedAdapter
from tunekit.adapters.base import Wrapper
from tunekit.adapters.kernels.liger import use_liger
from tunekit.errors import ModelError
from tunekit.machine.devices import kind_of
from tunekit.memory.checkpointing import prepare_layers
from tunekit.memory.offload import make_store
from tunekit.memory.streaming import gather_on_host, host_embedding, layer_weights, stream_base
from tunekit.memory.tiling import tile_layers
from tunekit.memory.vocabulary import HeadParts, head_obstacle, stream_head
from tunekit.model.attention.documents import uncompiled_attention
from tunekit.model.load import LoadedModel
from tunekit.model.quantized.weights import packed_layers
from tunekit.records import Choice
from tunekit.tuned.model import TunedModel

MOST_VARIANTS = 64  # of one function; beyond it torch would run plain code, whose rounding differs, from then on


def prepare_network(
    base: LoadedModel,
    choice: Choice,
    attach: Callable[[], AttachedAdapter] | None = None,
    *,
    planned_for: torch.device | None = None,
) -> TunedModel:
    """Put everything that `choice` names into the base's network: checkpointing, adapter, tiles, kernels, compiled
    layers, streaming.

    `attach` puts the adapter in when it is its turn. Layers are then seeded and recomputed as in the run, so that a
    calibrated initialisation may run them; what replaces or moves adapted layers comes after it.
    `planned_for`: the device of the run that a base on the meta device stands for. It has no compiled layers: they keep
    no more than plain ones.
    Raises: ModelError where an MLP cannot be computed in tiles, and whatever `attach` raises.
    """
    layers, frozen = base.family.layers(base.net), layer_weights(base)
    modules = [layer for _, layer in layers]
    forwards = compilable(modules) if choice.compiled and planned_for is None else []
    store = make_store(choice.activation_offload, planned_for or base.device, simulated=planned_for is not None)
    prepare_layers(modules, choice.checkpointed_layers, store)
    adapter = None if attach is None else attach()
    if choice.mlp_tile_tokens is not None:
        hidden = torch.empty(0, base.facts.hidden_size, dtype=base.dtype, device=base.device)  # (0, D)
        tile_layers(layers, choice.mlp_tile_tokens, hidden)
    if choice.kernels == "liger":
        use_liger(base.net)
    compile_layers(forwards)
    slots = stream_base(base, frozen, choice.streaming)
    parts = _streamed_head(base, choice)
    return TunedModel(base, adapter, store, slots, choice.logits_chunk_tokens, parts)


def _streamed_head(base: LoadedModel, choice: Choice) -> HeadParts | None:
    """The parts of the output projection, where it is streamed.

    Raises: ModelError where it cannot be.
    """
    if not choice.streamed_head:
        return None
    name, tier = base.family.head_name(base.net), "host" if choice.streaming == "off" else choice.streaming
    if not kind_of(base.device).own_memory:
        tier = "disk"  # where it is
    module = None if name is None else base.net.get_submodule(name)
    obstacle = None if module is None else head_obstacle(module, base.family.head(base.net))
    if module is None or obstacle is not None:
        what = obstacle or "the base has no output projection"
        raise ModelError(what, "write false", key="memory.streamed_head")
    embedding = host_embedding(base) if choice.streaming == "off" and base.device.type != "meta" else None
    if embedding is not None:  # else the layers' streaming has seen to it
        gather_on_host(embedding, base.device)
    return stream_head(cast(nn.Linear, module), base.device, tier, base.net)


class LayerForward:
    """A layer's forward, which may later be compiled for training.

    What is compiled is the model's own code of one layer (norms, residuals, rotations), once for all layers that share
    it. Adapted, packed and joined layers and attention over documents stay outside: each is one autograd function or
    one kernel already. Evaluation, generation and the passes before the adapter is in place run uncompiled.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.plain = layer, layer.forward
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, *inputs: object, **named: object) -> object:
        if self.compiled is not None and torch.is_grad_enabled():
            return self.compiled(*inputs, **named)
        return self.plain(*inputs, **named)


def compilable(layers: Sequence[nn.Module]) -> list[LayerForward]:
    """Put a LayerForward in the place of each layer's forward, before anything else wraps it."""
    forwards = [LayerForward(layer) for layer in layers]
    for forward in forwards:
        forward.layer.forward = forward
    return forwards


def compile_layers(forwards: Sequence[LayerForward]) -> None:
    """Compile from the next training forward on; the adapter must be in place.

    Sizes are symbols from the first compilation on, so that kernels do not depend on which batch came first: a resumed
    run computes what the uninterrupted one would have.
    """
    if not forwards:
        return
    from torch._dynamo import config

    uncompiled_attention()
    for forward in forwards:
        for module in forward.layer.modules():
            if _is_island(module):
                module.forward = torch.compiler.disable(module.forward)  # type: ignore[no-untyped-call]
        limited = config.patch(recompile_limit=MOST_VARIANTS)  # for the time of a call
        forward.compiled = limited(torch.compile(forward.plain, dynamic=True))


def _is_island(module: nn.Module) -> bool:
    """Whether compiled code must call this module as it is: with an adapter, packed, or with something else than its
    class's own forward, such as a fused MLP."""
    own = module.__dict__.get("forward")
    replaced = own is not None and not isinstance(own, LayerForward)
    return replaced or isinstance(module, Wrapper) or bool(packed_layers(module).get(""))
