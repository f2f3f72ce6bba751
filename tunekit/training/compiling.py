"""Decoder layers through torch.compile, layer by layer, where plan says that it pays.

Comes in: the layers before and after the adapter is in them.  Goes out: the same layers, whose own code runs compiled
in training.  Next: memory/checkpointing.py wraps them, seeds and recomputation outside.

What is compiled is the model's own code of one layer (norms, residuals, rotations), once for all layers that share it.
Adapted, packed and fused layers and attention over documents stay outside: each is one autograd function or one kernel
already. Evaluation, generation and the passes before the adapter is in place run uncompiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tunekit.adapters.base import Wrapper
from tunekit.model.attention.documents import uncompiled_attention
from tunekit.model.quantized.weights import packed_layers

MOST_VARIANTS = 64  # of one function; beyond it torch would run plain code, whose rounding differs, from then on


class LayerForward:
    """A layer's forward, which may later be compiled for training."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.plain = layer, layer.forward
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, *inputs: Any, **named: Any) -> Any:
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
        limited: Any = config.patch(recompile_limit=MOST_VARIANTS)  # for the time of a call
        forward.compiled = limited(torch.compile(forward.plain, dynamic=True))


def _is_island(module: nn.Module) -> bool:
    """Whether compiled code must call this module as it is."""
    return isinstance(module, Wrapper) or bool(packed_layers(module).get("")) or _replaced(module)


def _replaced(module: nn.Module) -> bool:
    """Whether something else than the class's own forward stands there, such as a fused MLP."""
    own = module.__dict__.get("forward")
    return own is not None and not isinstance(own, LayerForward)
