"""Gaussian initialisation of LoRA."""

import torch
from torch import Tensor

from tunekit.adapters.starts.start import StartLayer


def make_start(settings: object, layer: StartLayer[object]) -> tuple[Tensor, Tensor]:
    """A (R, I) ~ N(0, 1 / R^2), B (O, R) = 0, as in diffusers and PEFT."""
    a = torch.randn(layer.rank * layer.experts, layer.inputs, generator=layer.generator) / layer.rank
    return a, torch.zeros(layer.outputs, layer.rank * layer.experts)
