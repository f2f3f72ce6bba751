"""The update s B A of a layer, for all methods with two thin factors."""

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from tunekit.adapters.base import LayerAdapter, Settings
from tunekit.records import Target


class LowRankLayer(LayerAdapter[Settings]):
    """y = W x + s B A x, with the factors cast to x's dtype. A subclass defines `factors`, and `scaling` if s is not
    1.

    Shapes: x (..., I) -> y (..., O); A (R, I); B (O, R). Dropout acts on the update's input.
    """

    @property
    def scaling(self) -> float:
        """The factor s of the update, s B A x."""
        return 1.0

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (O, R)."""
        raise NotImplementedError

    def update(self, x: Tensor) -> Tensor:
        return low_rank_update(self.apply_dropout(x), self.factors(), self.scaling)

    @property
    def is_thin(self) -> bool:
        return True

    def thin_factors(self) -> tuple[Tensor, Tensor]:
        a, b = self.factors()
        return a, b * self.scaling

    def delta(self) -> Tensor:
        a, b = self.factors()
        return b @ a * self.scaling

    def low_rank(self, base_matrix: Callable[[], Tensor]) -> tuple[Tensor, Tensor] | None:
        return self.thin_factors()


def low_rank_update(x: Tensor, factors: tuple[Tensor, Tensor], scaling: float) -> Tensor:
    """s B A x: x (..., I) -> (..., O)."""
    a, b = (factor.to(x.dtype) for factor in factors)
    y = F.linear(F.linear(x, a), b)
    return y if scaling == 1 else y * scaling


def scaling_of(target: Target, r: int, alpha: float, use_rslora: bool = False) -> float:
    """alpha / R, or alpha / sqrt(R) with use_rslora. `r`, `alpha`: defaults if the target sets none."""
    rank = target.r or r
    return (alpha if target.alpha is None else target.alpha) / (math.sqrt(rank) if use_rslora else rank)
