"""Gradient checkpointing of decoder layers, and the seed each layer draws its randomness from.

Comes in: the decoder layers in order.  Goes out: the same modules, their forward replaced.  Next: training/resident.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tunekit.model.call import Call, calling, current_call, seed_for

# The seeds of what is drawn outside the layers: embedding dropout before them, an adapted head's dropout after them.
OUTSIDE_LAYERS, AFTER_LAYERS = -1, -2


def prepare_layers(layers: Sequence[nn.Module], checkpointed: int) -> None:
    """Seed every layer on entry, and recompute the first `checkpointed` of them in the backward pass.

    A layer's random numbers are a function of (seed, step, micro-batch, layer), so its recomputation draws the same
    dropout masks as its forward, in whatever order layers run; no RNG state needs to be kept.
    """
    for number, layer in enumerate(layers):
        run = _seeded(layer.forward, number)
        layer.forward = _checkpointed(layer, run) if number < checkpointed else run


def seed_layer(call: Call, number: int) -> None:
    """Seed torch for layer `number`, or for OUTSIDE_LAYERS or AFTER_LAYERS, of this call."""
    torch.manual_seed(seed_for(call.seed, call.step, call.micro_batch, number))


def _seeded(forward: Callable[..., Any], number: int) -> Callable[..., Any]:
    def run(*inputs: Any, **named: Any) -> Any:
        if torch.is_grad_enabled():  # evaluation draws nothing and must leave the generator as it is
            seed_layer(current_call(), number)
        return forward(*inputs, **named)

    return run


def _checkpointed(layer: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
    """Recompute inside the same Call, which a layer reads for bypass and seeds."""

    def forward(*inputs: Any, **named: Any) -> Any:
        if not (torch.is_grad_enabled() and layer.training):
            return run(*inputs, **named)
        call = current_call()

        def contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[Any]]:
            return contextlib.nullcontext(), calling(call)

        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **named)

    return forward
