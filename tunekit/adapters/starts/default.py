"""Uniform initialisation of LoRA."""

import math

import torch
from torch import Tensor, nn

from tunekit.adapters.starts.start import StartLayer


def make_start(settings: object, layer: StartLayer[object]) -> tuple[Tensor, Tensor]:
    """A (R, I) uniform within 1 / sqrt(I), B (O, R) = 0, as in Hu et al. and PEFT."""
    a = torch.empty(layer.rank * layer.experts, layer.inputs)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=layer.generator)
    return a, torch.zeros(layer.outputs, layer.rank * layer.experts)
