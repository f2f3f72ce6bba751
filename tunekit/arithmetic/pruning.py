"""Weighted sums of tensors after pruning by size or at random, or after removal of conflicting signs.

The definitions and the order of operations are the same as in PEFT's add_weighted_adapter.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")  # methods with a density
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
    """The sum of w_i t_i, where `kind` changes the tensors t_i first:

    linear             no change
    magnitude_prune    a share `density` of the elements, with the largest absolute values, is kept
    dare_linear        elements are kept with probability `density`, and divided by it (Yu et al. 2023)
    ties               pruned as in magnitude_prune; then each element is the mean, not the sum, over the tensors that
                       have the majority's sign there (Yadav et al. 2023)
    dare_ties          as ties, but pruned as in dare_linear
    `generators`: the random generator of each tensor.
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
    """The tensor in which only a share `density` of the elements, the elements with the largest absolute values, is
    kept. All others are 0."""
    if density >= 1:
        return tensor
    mask = torch.zeros_like(tensor).reshape(-1)
    mask[tensor.abs().reshape(-1).topk(int(density * tensor.numel())).indices] = 1
    return tensor * mask.reshape(tensor.shape)


def keep_random(tensor: Tensor, density: float, generator: Generator) -> Tensor:
    """Sets each element to 0 with probability 1 - density, and divides the tensor by `density`, so that its expected
    value stays the same."""
    if density >= 1:
        return tensor
    mask = torch.bernoulli(torch.full_like(tensor, density), generator=generator)
    return tensor * mask / density


def has_majority_sign(stack: Tensor, method: str) -> Tensor:
    """Whether each element has the majority's sign. Shapes: stack (tensors, ...).

    `method`: "total": the sign of the sum over the tensors; "frequency": the more frequent sign.
    """
    signs = stack.sign()
    votes = stack.sum(0) if method == "total" else signs.sum(0)
    return signs == torch.where(votes >= 0, 1, -1)
