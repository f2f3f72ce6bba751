"""Initialisation of A and B in LoRA-like layers. A "start" is an initialisation method; the name comes from the setting
`start` in recipes.

Some starts need evidence: data, or the unquantized weight. Without evidence they return the values of `default`;
`initialise_all` calls them again with the evidence before step 1.
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
LINEAR = ("linear", "conv1d")  # the kinds of layers that a start initialises


@dataclass(frozen=True)
class StartLayer(Generic[Evidence]):
    """The data about one layer that an initialisation method can use: sizes, the scaling s, the matrix W that the
    forward uses, and the collected evidence.

    `experts`: the number of experts of a fused parameter, whose A (R E, I) and B (O, R E) contain the factors of all E
    experts.
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
    """The activations of one layer in one micro-batch, without padding tokens.

    Shapes: inputs (N, I) float32; rows (N,), the number of each token's sequence; supervised (N,), whether the token
    has a loss; gradients (N, O) float32, of the loss with respect to the layer's output, if requested.
    """

    inputs: Tensor
    rows: Tensor
    supervised: Tensor
    gradients: Tensor | None = None


def start_module(name: str) -> ModuleType:
    """The module adapters/starts/NAME.py. The recipe's reader has already checked the name."""
    return import_module(f"tunekit.adapters.starts.{name}")


def make_factors(settings: StartSettings, layer: StartLayer[Any]) -> tuple[Tensor, Tensor]:
    """The factors A (R, I) and B (O, R). If the initialisation needs evidence that is not collected yet, the default
    factors."""
    name = "default" if settings.looks_at and layer.evidence is None else settings.method
    with torch.no_grad():
        factors: tuple[Tensor, Tensor] = start_module(name).make_start(settings, layer)
    return factors


def initialise_all(layers: Mapping[str, LayerAdapter[Any]], seed: int, evidence: Callable[[str], Any]) -> None:
    """Initialise the layers again, with the evidence that the initialisation method needs. A layer without evidence
    (None) keeps its first values."""
    for name, layer in sorted(layers.items()):
        layer_evidence = evidence(name)
        if layer.target.kind in LINEAR and layer_evidence is not None:
            layer.initialise_from(torch.Generator("cpu").manual_seed(seed_for("adapter", seed, name)), layer_evidence)
