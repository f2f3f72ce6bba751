"""Gaussian start of LoRA.  Comes in: the shapes of A and B.  Goes out: their values.  Next: lora.py."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def make_start(inputs: int, outputs: int, rank: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """A (R, I) ~ N(0, 1 / R^2), B (O, R) = 0, as diffusers and PEFT have it."""
    return torch.randn(rank, inputs, generator=generator) / rank, torch.zeros(outputs, rank)
