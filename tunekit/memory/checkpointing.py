"""Gradient checkpointing of decoder layers, and the random seed of each layer.

Only the input of a recomputed layer is stored; offload.py can move this input to the host.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunekit.memory.offload import BoundaryStore
from tunekit.model.call import calling, current_call, seed_layer


def prepare_layers(layers: Sequence[nn.Module], checkpointed: int, store: BoundaryStore | None = None) -> None:
    """Seed the random numbers of every layer when it starts, and recompute the first `checkpointed` layers in the
    backward pass.

    In a seeded Call, a layer's random numbers are a function of (seed, step, micro-batch, layer). So the recomputation
    draws the same dropout masks as the forward, and no state of random generators is stored.
    `store`: stores the inputs of recomputed layers. The input of the last recomputed layer stays on the device, because
    it is needed again at once.
    """
    checkpoints = _Checkpoints(BoundaryStore(None) if store is None else store, checkpointed - 1)
    for number, layer in enumerate(layers):
        run = partial(_seeded, layer.forward, number)
        layer.forward = partial(checkpoints.forward, layer, run, number) if number < checkpointed else run


def _seeded(forward: Callable[..., object], number: int, /, *inputs: object, **named: object) -> object:
    """Run a layer, whose random numbers are seeded when it starts."""
    call = current_call()
    if call.seeded:
        seed_layer(call, number)
    return forward(*inputs, **named)


class _Checkpoints:
    """Runs layers that are recomputed in the backward pass, and puts their inputs into a store. Several forwards can
    have inputs in it at the same time. `last`: the last recomputed layer."""

    def __init__(self, store: BoundaryStore, last: int) -> None:
        self.store, self.last = store, last
        self.forwards = 0  # number of forwards started so far; two can be alive at the same time
        self.newest = -1  # the layer that ran last

    def forward(
        self, layer: nn.Module, run: Callable[..., object], number: int, /, *inputs: object, **named: Any
    ) -> object:
        """Run a layer. The recomputation uses the same Call (adapter bypass and seeds) as the forward."""
        if not (torch.is_grad_enabled() and layer.training):
            return run(*inputs, **named)
        call = current_call()
        hidden, *others = inputs or (named.pop("hidden_states"),)
        assert isinstance(hidden, Tensor)
        if number <= self.newest:  # a new forward, or a layer that runs more than once in a forward
            self.forwards += 1
        self.newest = number
        key = self.forwards, number
        self.store.put(key, hidden, stays=number == self.last)
        stand_in = hidden.new_empty(0)  # shows the device to `checkpoint`, and keeps no memory alive
        return checkpoint(
            _CheckpointedLayer(self.store, key, run, hidden),
            stand_in,
            *others,
            use_reentrant=False,
            preserve_rng_state=not call.seeded,
            context_fn=lambda: (contextlib.nullcontext(), calling(call)),
            **named,
        )


class _CheckpointedLayer:
    """Runs a layer: the forward uses the layer's input, the recomputation uses the stored copy of this input.

    This object and the stored input exist as long as the graph that may recompute the layer.
    """

    def __init__(self, store: BoundaryStore, key: tuple[int, int], run: Callable[..., object], hidden: Tensor) -> None:
        self.store, self.key, self.run = store, key, run
        self.requires_grad = hidden.requires_grad
        self.hidden: Tensor | None = hidden
        weakref.finalize(self, store.drop, key).atexit = False

    def __call__(self, stand_in: Tensor, *inputs: object, **named: object) -> object:
        hidden, self.hidden = self.hidden, None
        if hidden is None:
            hidden = self.store.take(self.key).detach().requires_grad_(self.requires_grad)
            forward, number = self.key
            self.store.prefetch((forward, number - 1))
        return self.run(hidden, *inputs, **named)
