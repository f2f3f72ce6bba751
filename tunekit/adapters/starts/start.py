"""How A and B of a layer of the LoRA family are initialised: what an initialisation (`start` in recipes) is given, and
when it is asked.

A layer, its generator, and what its initialisation looks at go in; A and B come out. One that looks at data or at the
unquantized weight gives the values of `default` first, and is asked again by `initialise_all` before step 1.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, Generic, TypeVar

import torch
from torch import Generator, Tensor

from tunekit.adapters.base import LayerAdapter
from tunekit.model.call import seed_for
from tunekit.recipe.bases.section import StartSettings

Evidence = TypeVar("Evidence")
LINEAR = ("linear", "conv1d")  # the kinds of layers that a start fills


@dataclass(frozen=True)
class StartLayer(Generic[Evidence]):
    """What a start sees of one layer: its sizes, s, W as it takes part in the forward, and what was gathered of it.

    `experts`: of a fused parameter, whose A (R E, I) and B (O, R E) hold the factors of all of them.
    """

    name: str
    inputs: int
    outputs: int
    rank: int
    scaling: float
    generator: Generator
    weight: Callable[[], Tensor]  # -> (O, I) float32
    evidence: Evidence
    experts: int = 1


@dataclass(frozen=True)
class LayerActivations:
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


def make_factors(settings: StartSettings, layer: StartLayer[Any]) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R); without the evidence that an initialisation looks at, those of the default."""
    name = "default" if settings.looks_at and layer.evidence is None else settings.method
    with torch.no_grad():
        factors: tuple[Tensor, Tensor] = start_module(name).make_start(settings, layer)
    return factors


def initialise_all(layers: Mapping[str, LayerAdapter[Any]], seed: int, evidence: Callable[[str], Any]) -> None:
    """Fill the layers of a start that looks at something; one without evidence (None) keeps its first values."""
    for name, layer in sorted(layers.items()):
        found = evidence(name)
        if layer.target.kind in LINEAR and found is not None:
            layer.initialise_from(torch.Generator("cpu").manual_seed(seed_for("adapter", seed, name)), found)
