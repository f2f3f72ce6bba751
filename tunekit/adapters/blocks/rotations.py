"""Block-wise orthogonal matrices from trained numbers, and their product with a layer's inputs."""

import torch
from torch import Tensor


def skew_of(upper: Tensor, size: int) -> Tensor:
    """Skew-symmetric Q (blocks, b, b) with the rows of `upper` (blocks, b (b - 1) / 2) above its diagonal."""
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    matrix = upper.new_zeros(upper.shape[0], size, size).index_put(
        (torch.arange(upper.shape[0], device=upper.device)[:, None], rows, columns), upper
    )
    return matrix - matrix.transpose(1, 2)


def cayley(q: Tensor) -> Tensor:
    """R = (I - Q) (I + Q)^-1 of each block: orthogonal for skew-symmetric Q (blocks, b, b)."""
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    # I + Q always has an inverse; torch.linalg.solve would wait for the device to check that
    return torch.linalg.solve_ex(identity + q, identity - q, left=False)[0]


def cayley_neumann(q: Tensor, terms: int) -> Tensor:
    """I + 2 Q + 2 Q^2 + ... + Q^last, in Horner's form: the truncated series of (I + Q) (I - Q)^-1.

    With one term the result is I, with two terms I + 2 Q. With more terms, the last power is max(3, terms - 1) and has
    the factor 1, as in peft.
    """
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand_as(q)
    if terms == 1:
        return identity + 0 * q
    if terms == 2:
        return identity + 2 * q
    power = q
    for _ in range(max(3, terms - 1) - 1):
        power = q @ (2 * identity + power)
    return identity + power


def rotate_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """Computes x R for a block-diagonal R: each b consecutive numbers of x (..., I) are multiplied by their block of
    `blocks` (blocks, b, b). If there is a single block, it is used for all of them."""
    size = blocks.shape[-1]
    parts = x.reshape(*x.shape[:-1], -1, 1, size)  # (..., I / b, 1, b)
    return (parts @ blocks).flatten(-3)
