"""Frozen random matrices, drawn exactly as PEFT draws them. A file that omits them therefore gives the same adapter in
tunekit and in PEFT."""

import math

import torch
from torch import Generator, Tensor

from tunekit.adapters.base import Slot


def projection_slot(saved: bool, suffix: str, shape: tuple[int, ...]) -> Slot:
    """Declares a random matrix that the seed determines. `saved`: the adapter's file contains it; otherwise only
    checkpoints contain it."""
    return Slot(suffix, shape, kind="saved" if saved else "resume")


def kaiming_uniform(
    shape: tuple[int, ...], generator: Generator, gain: float = math.sqrt(2), dtype: torch.dtype = torch.float32
) -> Tensor:
    """Uniform random numbers between -b and b, b = gain sqrt(3 / fan-in). The fan-in is the product of all dimensions
    after the first."""
    bound = math.sqrt(3.0) * (gain / math.sqrt(math.prod(shape[1:])))
    return torch.empty(shape, dtype=dtype).uniform_(-bound, bound, generator=generator)


def ternary(shape: tuple[int, ...], generator: Generator, sparsity: float) -> Tensor:
    """Random numbers -1, 0 and 1. On average, one in `sparsity` of them is not 0."""
    uniform = torch.rand(shape, generator=generator)
    return (uniform > 1 - 1 / (2 * sparsity)).float() - (uniform < 1 / (2 * sparsity)).float()
