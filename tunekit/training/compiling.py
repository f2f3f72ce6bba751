"""Decoder layers through torch.compile, layer by layer, where plan says that it pays.

Comes in: the layers before and after the adapter is in them.  Goes out: the same layers, whose own code runs compiled
in training.  Next: memory/checkpointing.py wraps them, seeds and recomputation outside.

What is compiled is the model's own code of one layer (norms, residuals, rotations), once for all layers that share it.
Adapted, packed and fused layers and attention over documents stay outside: each is one autograd function or one kernel
already. Evaluation, generation and the passes before the adapter is in place run uncompiled.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from tunekit.adapters.base import Wrapper
from tunekit.adapters.kernels.joined_lora import liger_places
from tunekit.errors import Problem
from tunekit.model.attention.documents import uncompiled_attention
from tunekit.model.quantized.weights import packed_layers

LEAST_STEPS = 500  # below it a run ends before compiling has paid
MOST_VARIANTS = 64  # of one function; beyond it torch would run plain code, whose rounding differs, from then on
KEY = "training.compile"


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

    config.recompile_limit = MOST_VARIANTS
    uncompiled_attention()
    for forward in forwards:
        for module in forward.layer.modules():
            if _is_island(module):
                module.forward = torch.compiler.disable(module.forward)  # type: ignore[no-untyped-call]
        forward.compiled = torch.compile(forward.plain, dynamic=True)


def _is_island(module: nn.Module) -> bool:
    """Whether compiled code must call this module as it is."""
    return isinstance(module, Wrapper) or bool(packed_layers(module).get("")) or _replaced(module)


def _replaced(module: nn.Module) -> bool:
    """Whether something else than the class's own forward stands there, such as a fused MLP."""
    own = module.__dict__.get("forward")
    return own is not None and not isinstance(own, LayerForward)


def planned_compile(setting: str | bool, device: torch.device, steps: int) -> tuple[bool, str]:
    """Whether layers are compiled, and why."""
    if isinstance(setting, bool):
        return setting, "as the recipe says"
    if device.type != "cuda":
        return False, "a CPU gains nothing by it"
    if steps < LEAST_STEPS:
        return False, f"{steps:,} steps end before it has paid; from {LEAST_STEPS} on"
    if find_spec("triton") is None:
        return False, "triton is not installed"
    return True, f"{steps:,} steps on a GPU"


def compile_notes(setting: str | bool, device: torch.device, steps: int) -> list[str]:
    """What plan says of it, where the recipe asked."""
    if setting is False:
        return []
    compiled, reason = planned_compile(setting, device, steps)
    beside = "; the first step takes longer, and compiled rounding differs in the last digits" if compiled else ""
    return [f"decoder layers compiled: {'yes' if compiled else 'no'}, {reason}{beside}"]


def compile_problems(compiled: bool, device: torch.device, whole_model_adapter: bool) -> Iterator[Problem]:
    """Why layers could not be compiled."""
    if not compiled:
        return
    if whole_model_adapter:
        what = "an adapter of the whole model enters the attention, which is not compiled with it"
        yield Problem(what, "write compile: false", key=KEY)
    if device.type == "cuda" and find_spec("triton") is None:
        yield Problem("compiling for a GPU needs triton", "run: pip install triton, or write compile: false", key=KEY)
    if device.type == "cpu" and not _has_compiler():
        yield Problem("compiling for a CPU needs a C++ compiler", "install g++, or write compile: false", key=KEY)


def kernel_problems(kernels: str, device: torch.device) -> Iterator[Problem]:
    """Why the recipe's kernels cannot be used."""
    if kernels == "none":
        return
    if device.type != "cuda":
        yield Problem("liger-kernel's kernels run on a GPU only", "write kernels: none", key="training.kernels")
    elif find_spec("liger_kernel") is None:
        how = "run: pip install liger-kernel, or write kernels: none"
        yield Problem("liger-kernel is not installed", how, key="training.kernels")


def kernel_notes(kernels: str, net: nn.Module) -> Iterator[str]:
    """What they will compute."""
    if kernels == "liger":
        yield (
            f"liger-kernel computes {len(liger_places(net)[0])} norms, and SwiGLU where the MLP is computed in one go; "
            "what they save is not in the predicted peak"
        )


def _has_compiler() -> bool:
    named = os.environ.get("CXX")
    return any(shutil.which(name) for name in ([named] if named else ["g++", "clang++"]))
