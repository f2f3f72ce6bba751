"""Gradient checkpointing of decoder layers, and the seed each layer draws its randomness from.

Comes in: the decoder layers in order.  Goes out: the same modules, their forward replaced.
What enters a recomputed layer is all that is kept of it; offload.py lets that wait on the host.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunekit.memory.offload import BoundaryStore
from tunekit.model.call import calling, current_call, seed_layer


def prepare_layers(layers: Sequence[nn.Module], checkpointed: int, store: BoundaryStore | None = None) -> None:
    """Seed every layer on entry, and recompute the first `checkpointed` of them in the backward pass.

    A layer's random numbers are a function of (seed, step, micro-batch, layer), so its recomputation draws the same
    dropout masks as its forward, in whatever order layers run; no RNG state needs to be kept.
    `store`: where the inputs of recomputed layers wait; the last one's is needed at once and stays where it is.
    """
    boundaries = _Boundaries(BoundaryStore(None) if store is None else store, checkpointed - 1)
    for number, layer in enumerate(layers):
        run = _seeded(layer.forward, number)
        layer.forward = _checkpointed(layer, run, number, boundaries) if number < checkpointed else run


def _seeded(forward: Callable[..., object], number: int) -> Callable[..., object]:
    def run(*inputs: object, **named: object) -> object:
        if torch.is_grad_enabled():  # evaluation draws nothing and must leave the generator as it is
            seed_layer(current_call(), number)
        return forward(*inputs, **named)

    return run


def _checkpointed(
    layer: nn.Module, run: Callable[..., object], number: int, boundaries: _Boundaries
) -> Callable[..., object]:
    """Recompute inside the same Call, which a layer reads for bypass and seeds."""

    def forward(*inputs: object, **named: Any) -> object:
        if not (torch.is_grad_enabled() and layer.training):
            return run(*inputs, **named)
        call = current_call()
        hidden, *others = inputs or (named.pop("hidden_states"),)
        assert isinstance(hidden, Tensor)
        part = boundaries.leave(run, number, hidden)
        stand_in = hidden.new_empty(0)  # tells checkpoint the device, and keeps nothing alive
        return checkpoint(
            part,
            stand_in,
            *others,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (contextlib.nullcontext(), calling(call)),
            **named,
        )

    return forward


class _Boundaries:
    """The inputs of recomputed layers, forward after forward, in one store."""

    def __init__(self, store: BoundaryStore, last: int) -> None:
        self.store, self.last = store, last
        self.forwards = 0  # so far: two may be alive at a time
        self.newest = -1  # the layer that ran last

    def leave(self, run: Callable[..., object], number: int, hidden: Tensor) -> Callable[..., object]:
        """`run` for checkpoint(): its first input is `hidden`, which waits in the store for the recomputation."""
        if number <= self.newest:  # another forward, or a layer that runs more than once in one
            self.forwards += 1
        self.newest = number
        self.store.put((self.forwards, number), hidden, stays=number == self.last)
        return _Left(self.store, (self.forwards, number), run, hidden)


class _Left:
    """A layer's run: called once with the input itself, and again with what the store kept of it.

    It lives as long as the graph that may recompute the layer, and the store keeps the input as long.
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
