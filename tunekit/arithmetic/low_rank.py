"""The low-rank update of one layer, D = s B A, and properties computed without D itself.

Norms and products are taken in float64 from R x R matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LARGE_SIDE = 2048  # a matrix without a side up to this is not decomposed whole, but through random projections
EXTRA_DIRECTIONS, POWER_STEPS = 32, 8  # of those projections


@dataclass(frozen=True)
class LowRank:
    """D = s B A.    Shapes: A (R, I); B (O, R); D (O, I), of an embedding stored as D^T."""

    a: Tensor
    b: Tensor
    scaling: float
    embedding: bool = False

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.b.shape[0], self.a.shape[1]

    def dense(self) -> Tensor:
        """D (O, I), float32."""
        return self.b @ self.a * self.scaling

    def inner(self, other: LowRank) -> float:
        """The sum over all numbers of D * E, E = s' B' A': the sum of (B^T B') * (A A'^T) times s s'."""
        left = self.b.double().t() @ other.b.double()  # (R, R')
        right = self.a.double() @ other.a.double().t()  # (R, R')
        return float((left * right).sum()) * self.scaling * other.scaling

    def norm(self) -> float:
        """The Frobenius norm of D."""
        return math.sqrt(max(self.inner(self), 0.0))

    def folded(self) -> LowRank:
        """The same D with s = 1: B takes s."""
        return LowRank(self.a, self.b * self.scaling, 1.0, self.embedding) if self.scaling != 1.0 else self

    def padded(self, rank: int) -> LowRank:
        """The same D at a higher rank, filled with zeros; s is kept."""
        more = rank - self.rank
        a = torch.cat([self.a, self.a.new_zeros(more, self.a.shape[1])])
        b = torch.cat([self.b, self.b.new_zeros(self.b.shape[0], more)], dim=1)
        return LowRank(a, b, self.scaling, self.embedding)


def weighted_sum(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Sum of w_i D_i, exactly: the factors side by side, rank the sum of the ranks, s = 1.

    A takes w_i s_i, as PEFT's `cat` has it.
    """
    a = torch.cat([update.a * (weight * update.scaling) for update, weight in zip(updates, weights, strict=True)])
    b = torch.cat([update.b for update in updates], dim=1)
    return LowRank(a, b, 1.0, updates[0].embedding)


def reduce_rank(update: LowRank, rank: int) -> LowRank:
    """The nearest update of that rank: the singular values of B A through QR of both factors, D itself is not made.

    The root of each singular value goes to either side; s = 1.
    """
    left, upper = torch.linalg.qr(update.b.double())  # (O, R), (R, R)
    right, lower = torch.linalg.qr(update.a.double().t())  # (I, R), (R, R)
    u, values, vh = torch.linalg.svd(upper @ lower.t() * update.scaling)
    return _balanced(left @ u, values, vh @ right.t(), rank, update.embedding)


def decompose(matrix: Tensor, rank: int, *, embedding: bool = False) -> LowRank:
    """The nearest update of that rank to a matrix (O, I): its truncated singular value decomposition, s = 1.

    Beyond LARGE_SIDE on both sides it is found through random projections, always the same ones (Halko et al. 2011):
    the caller measures the error in any case.
    """
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= LARGE_SIDE:
        u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
        return _balanced(u, values, vh, rank, embedding)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, values, v = torch.svd_lowrank(matrix, q=min(rank + EXTRA_DIRECTIONS, *matrix.shape), niter=POWER_STEPS)
    return _balanced(u, values, v.t(), rank, embedding)


def _balanced(u: Tensor, values: Tensor, vh: Tensor, rank: int, embedding: bool) -> LowRank:
    """U S V^T cut to `rank`, float32."""
    root = values[:rank].clamp_min(0).sqrt()
    a, b = (vh[:rank] * root[:, None]).float(), (u[:, :rank] * root).float()
    return LowRank(a.contiguous(), b.contiguous(), 1.0, embedding)
