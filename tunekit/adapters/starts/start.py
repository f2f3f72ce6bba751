"""How A and B of a layer of the LoRA family are first filled: what a start is given, and who is asked when.

Comes in: a layer, its generator, and what its start looks at.  Goes out: values in place.  Next: adapters/starts/.
Starts that look at data or at the unquantized weight begin as `default` and are filled by `begin_all` before step 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from tunekit.model.call import seed_for
from tunekit.model.quantized.weights import weight_of

if TYPE_CHECKING:
    from tunekit.adapters.attach import AttachedAdapter
    from tunekit.adapters.methods.lora import Lora

LINEAR = ("linear", "conv1d")  # the kinds of layers that a start fills


@dataclass(frozen=True)
class StartLayer:
    """What a start sees of one layer: its sizes, s, W as it takes part in the forward, and what was gathered of it."""

    name: str
    inputs: int
    outputs: int
    rank: int
    scaling: float
    generator: Generator
    weight: Callable[[], Tensor]  # -> (O, I) float32
    evidence: Any = None


@dataclass(frozen=True)
class Seen:
    """What one micro-batch brings to one layer, real tokens only.

    Shapes: inputs (N, I) float32; rows (N,), which sequence each token is of; supervised (N,), whether a loss is taken
    at it; gradients (N, O) float32 of the loss by the layer's output, where they are asked for.
    """

    inputs: Tensor
    rows: Tensor
    supervised: Tensor
    gradients: Tensor | None = None


def start_module(name: str) -> ModuleType:
    """adapters/starts/NAME.py; the recipe has checked that the name is one of ours."""
    return import_module(f"tunekit.adapters.starts.{name}")


def begin(layer: Lora, generator: Generator, evidence: Any = None) -> None:
    """Fill A and B, and what of W they hold at the start.

    Shapes: A (R, I), B (O, R).
    """
    settings = layer.settings.start
    name = "default" if settings.looks_at and evidence is None else settings.method
    (rank, inputs), outputs = layer.A.shape, layer.B.shape[0]
    given = StartLayer(
        layer.target.name, inputs, outputs, rank, layer.scaling, generator, lambda: _weight(layer), evidence
    )
    with torch.no_grad():
        a, b = start_module(name).make_start(settings, given)
        layer.A.copy_(a)
        layer.B.copy_(b)
        if "start_A" in layer.held:
            layer.start_A.copy_(layer.A)
            layer.start_B.copy_(layer.B)


def _weight(layer: Lora) -> Tensor:
    weight = weight_of(layer.base_layer)
    assert weight is not None
    return weight.read()


def begin_all(attached: AttachedAdapter, seed: int, evidence: Mapping[str, Any] | Callable[[str], Any]) -> None:
    """Fill the layers of a start that looks at something; one without evidence (None) stays as it began."""
    for name, layer in attached.adapted_modules().items():
        found = evidence(name) if callable(evidence) else evidence.get(name)
        if layer.target.kind in LINEAR and found is not None:
            layer.begin(torch.Generator("cpu").manual_seed(seed_for("adapter", seed, name)), found)
