"""Weighted sums of tensors that were changed first: pruned by size or at random, or freed of conflicting signs.

The definitions, with their order of operations, are those of PEFT's add_weighted_adapter.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")  # these take a density
SIGNS = ("total", "frequency")


def weighted(
    kind: str,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float = 1.0,
    majority_sign: str = "total",
    generators: Sequence[Generator] = (),
) -> Tensor:
    """The sum of w_i t_i, each t_i as `kind` changes it.

    linear             as it is
    magnitude_prune    only the largest numbers, a share `density` of them
    dare_linear        only numbers drawn with probability `density`, divided by it (Yu et al. 2023)
    ties               pruned by size; then of each place only those tensors that have the majority's sign, and their
                       mean in place of the sum (Yadav et al. 2023)
    dare_ties          the same after the random choice
    `generators`: one for each tensor, of the random choices.
    """
    changed = list(tensors)
    if kind in ("magnitude_prune", "ties"):
        changed = [keep_largest(tensor, density) for tensor in tensors]
    elif kind in ("dare_linear", "dare_ties"):
        changed = [keep_random(t, density, generator) for t, generator in zip(tensors, generators, strict=True)]
    stack = torch.stack(changed)  # (adapters, ...)
    factors = torch.tensor(list(weights), dtype=stack.dtype).reshape(-1, *[1] * (stack.dim() - 1))
    if kind not in ("ties", "dare_ties"):
        return (stack * factors).sum(0)
    agreeing = has_majority_sign(stack, majority_sign)
    return (stack * factors * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def keep_largest(tensor: Tensor, density: float) -> Tensor:
    """Zero all but the share `density` of largest size, rounded down."""
    if density >= 1:
        return tensor
    mask = torch.zeros_like(tensor).reshape(-1)
    mask[tensor.abs().reshape(-1).topk(int(density * tensor.numel())).indices] = 1
    return tensor * mask.reshape(tensor.shape)


def keep_random(tensor: Tensor, density: float, generator: Generator) -> Tensor:
    """Zero each number with probability 1 - density and divide by density, so that the mean stays."""
    if density >= 1:
        return tensor
    mask = torch.bernoulli(torch.full_like(tensor, density), generator=generator)
    return tensor * mask / density


def has_majority_sign(stack: Tensor, method: str) -> Tensor:
    """Whether each number has the sign of its place's sum (total), or the commoner sign there (frequency)."""
    signs = stack.sign()
    votes = stack.sum(0) if method == "total" else signs.sum(0)
    return signs == torch.where(votes >= 0, 1, -1)
