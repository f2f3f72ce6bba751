"""Frozen random matrices drawn as PEFT draws them, so that a file without them means the same."""

import math

import torch
from torch import Generator, Tensor

from tunekit.adapters.base import Slot


def projection_slot(saved: bool, suffix: str, shape: tuple[int, ...]) -> Slot:
    """In the adapter's file if it is `saved`, else only in checkpoints: it follows from the seed."""
    return Slot(suffix, shape, kind="saved" if saved else "resume")


def kaiming_uniform(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Uniform within sqrt(6 / fan-in), the fan-in being all dimensions but the first."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(math.prod(shape[1:])))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def ternary(shape: tuple[int, ...], generator: Generator, sparsity: float) -> Tensor:
    """-1, 0 or 1, one in `sparsity` not 0."""
    drawn = torch.rand(shape, generator=generator)
    return (drawn > 1 - 1 / (2 * sparsity)).float() - (drawn < 1 / (2 * sparsity)).float()
