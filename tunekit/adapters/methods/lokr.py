"""LoKr, for linear layers and Conv1D, quantized or not."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tunekit.adapters.base import LayerAdapter, PeftConfig, Slot, Slots
from tunekit.adapters.blocks.low_rank_layer import scaling_of
from tunekit.adapters.folder.fields import ANY, Fixed, PeftSide, same_names
from tunekit.adapters.method import Method
from tunekit.recipe.adapters.lokr import LokrSettings
from tunekit.records import Target


class Lokr(LayerAdapter[LokrSettings]):
    """Kronecker update: y = W x + (alpha / r) (C (x) D) x, O = L K, I = M N; C and D are full, or products of two
    factors.

    Shapes: x (..., I) -> y (..., O); C (L, M) or (L, R) (R, M); D (K, N) or (K, R) (R, N). (C (x) D) x is C X D^T for
    x reshaped to X (M, N): the Kronecker product is never computed.
    Starts as the identity: C, or its left factor, is 0. Source: Yeh et al. 2024, eq. 6.
    """

    @classmethod
    def slots(cls, settings: LokrSettings, target: Target) -> Slots:
        rank = target.r or settings.r
        rows, more_rows = divisors(target.out_features, settings.decompose_factor)  # L, K
        columns, more_columns = divisors(target.in_features, settings.decompose_factor)  # M, N
        slots = _slots("w1", rows, columns, rank if settings.decompose_both and rank < max(rows, columns) / 2 else 0)
        large = max(more_rows, more_columns)
        return slots | _slots("w2", more_rows, more_columns, rank if rank < large / 2 else 0)

    def matrix(self, name: str) -> Tensor:
        """The matrix C (`name` w1) or D (w2)."""
        if name in self.declared:
            return self.get_parameter(name)
        return self.get_parameter(f"{name}_a") @ self.get_parameter(f"{name}_b")

    @property
    def scaling(self) -> float:
        """alpha / r."""
        return scaling_of(self.target, self.settings.r, self.settings.alpha)

    def update(self, x: Tensor) -> Tensor:
        c, d = self.matrix("w1").to(x.dtype), self.matrix("w2").to(x.dtype)
        grid = x.reshape(*x.shape[:-1], c.shape[1], d.shape[1])  # (..., M, N)
        return (c @ (grid @ d.t())).flatten(-2).mul(self.scaling)

    def delta(self) -> Tensor:
        return torch.kron(self.matrix("w1"), self.matrix("w2")) * self.scaling


def _slots(name: str, rows: int, columns: int, rank: int) -> Slots:
    """Declares the tensors of a full matrix, or of its two factors if `rank` is not 0."""
    first = 0.0 if name == "w1" else None
    if not rank:
        return {name: Slot(f"lokr_{name}", (rows, columns), first=first)}
    left = Slot(f"lokr_{name}_a", (rows, rank), first=first)
    return {f"{name}_a": left, f"{name}_b": Slot(f"lokr_{name}_b", (rank, columns), first=None)}


def divisors(size: int, bound: int) -> tuple[int, int]:
    """Two numbers m and n with m n = size.

    If `bound` divides `size`, m is `bound`. Otherwise m is the largest divisor that exceeds neither `bound` nor
    sqrt(size). A `bound` of -1 means no bound.
    """
    if bound > 0 and size % bound == 0:
        return bound, size // bound
    highest = math.isqrt(size) if bound == -1 else min(bound, math.isqrt(size))
    smaller = max(m for m in range(1, max(highest, 1) + 1) if size % m == 0)
    return smaller, size // smaller


FIELDS = same_names(r=8, alpha=8, decompose_both=False, decompose_factor=-1)
FIXED: Fixed = {
    "init_weights": (True, False, "lycoris"),
    "module_dropout": (0.0, ANY),  # used only in peft's training, like the next two
    "rank_dropout": (0.0, ANY),
    "rank_dropout_scale": (False, True),
    "use_effective_conv2d": (False, True),  # for convolutions, which are not adapted
}


@dataclass(frozen=True)
class LokrSide(PeftSide[LokrSettings]):
    """Converts to and from PEFT's fields. Before PEFT 0.14, which added rank_dropout_scale, PEFT did not scale the
    product."""

    def read(self, config: PeftConfig, file: str) -> LokrSettings:
        settings = super().read(config, file)
        if "rank_dropout_scale" in config:
            return settings
        return settings.model_copy(update={"alpha": float(settings.r), "alpha_pattern": dict(settings.rank_pattern)})


METHOD = Method(peft=LokrSide("LOKR", LokrSettings, FIELDS, FIXED), layer=Lokr)
