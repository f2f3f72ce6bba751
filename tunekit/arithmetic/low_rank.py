"""The low-rank update D = s B A of one layer, and computations with it that do not need the matrix D.

Norms and inner products are computed in float64 from R x R matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LARGE_SIDE = 2048  # if both sides of a matrix are larger, it is decomposed through random projections
EXTRA_DIRECTIONS, POWER_STEPS = 32, 8  # settings of the random projections


@dataclass(frozen=True)
class LowRank:
    """The low-rank update D = s B A of a layer. Shapes: A (R, I); B (O, R); D (O, I). For an embedding, the transpose
    of D is added to the matrix."""

    a: Tensor
    b: Tensor
    scaling: float
    embedding: bool = False

    @property
    def rank(self) -> int:
        """The rank R."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (O, I) of D."""
        return self.b.shape[0], self.a.shape[1]

    def dense(self) -> Tensor:
        """The matrix D (O, I), float32."""
        return self.b @ self.a * self.scaling

    def inner(self, other: LowRank) -> float:
        """The inner product of D with another update E = s' B' A': the sum of all elements of D * E.

        It is computed as s s' times the sum of all elements of (B^T B') * (A A'^T).
        """
        left = self.b.double().t() @ other.b.double()  # (R, R')
        right = self.a.double() @ other.a.double().t()  # (R, R')
        return float((left * right).sum()) * self.scaling * other.scaling

    def norm(self) -> float:
        """The Frobenius norm of D."""
        return math.sqrt(max(self.inner(self), 0.0))

    def folded(self) -> LowRank:
        """The same D with s = 1: B is multiplied by the old s."""
        return LowRank(self.a, self.b * self.scaling, 1.0, self.embedding) if self.scaling != 1.0 else self

    def padded(self, rank: int) -> LowRank:
        """The same D with a higher rank: the factors are padded with zeros, and s is unchanged."""
        more = rank - self.rank
        a = torch.cat([self.a, self.a.new_zeros(more, self.a.shape[1])])
        b = torch.cat([self.b, self.b.new_zeros(self.b.shape[0], more)], dim=1)
        return LowRank(a, b, self.scaling, self.embedding)


def weighted_sum(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """The exact sum of w_i D_i, with concatenated factors. Its rank is the sum of the ranks, and its s is 1.

    Each A_i is multiplied by w_i s_i, as in PEFT's `cat`.
    """
    a = torch.cat([update.a * (weight * update.scaling) for update, weight in zip(updates, weights, strict=True)])
    b = torch.cat([update.b for update in updates], dim=1)
    return LowRank(a, b, 1.0, updates[0].embedding)


def reduce_rank(update: LowRank, rank: int) -> LowRank:
    """The update of at most rank `rank` that is nearest to s B A, from the singular values of s B A. The matrix D is
    not computed; QR decompositions of both factors suffice.

    Each new factor contains the square roots of the singular values; s = 1.
    """
    left, upper = torch.linalg.qr(update.b.double())  # (O, R), (R, R)
    right, lower = torch.linalg.qr(update.a.double().t())  # (I, R), (R, R)
    u, values, vh = torch.linalg.svd(upper @ lower.t() * update.scaling)
    return _balanced(left @ u, values, vh @ right.t(), min(rank, *update.shape), update.embedding)


def decompose(matrix: Tensor, rank: int, *, embedding: bool = False) -> LowRank:
    """The update of rank `rank` that is nearest to a matrix (O, I): its truncated singular value decomposition, s = 1.

    If both sides exceed LARGE_SIDE, the decomposition is approximated through fixed random projections (Halko et al.
    2011). The caller measures the error.
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
    """The update U S V^T in float32, truncated to `rank`. Each factor contains the square roots of the singular
    values."""
    root = values[:rank].clamp_min(0).sqrt()
    a, b = (vh[:rank] * root[:, None]).float(), (u[:, :rank] * root).float()
    return LowRank(a.contiguous(), b.contiguous(), 1.0, embedding)
