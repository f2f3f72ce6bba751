"""The update s B A of a layer, as every method has it whose update has two thin factors."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tunekit.adapters.base import LayerAdapter
from tunekit.records import Target


class LowRankLayer(LayerAdapter):
    """y = W x + s B A x, the factors cast to x's dtype. A subclass gives `factors`, and `scaling` where s is not 1.

    Shapes: x (..., I) -> y (..., O); A (R, I); B (O, R).    Dropout acts on the update's input.
    """

    @property
    def scaling(self) -> float:
        """s."""
        return 1.0

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (O, R)."""
        raise NotImplementedError

    def update(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.settings.dropout, self.training)
        a, b = (factor.to(x.dtype) for factor in self.factors())
        y = F.linear(F.linear(x, a), b)
        return y if self.scaling == 1 else y * self.scaling

    def delta(self) -> Tensor:
        a, b = self.factors()
        return b @ a * self.scaling


def rank_of(settings: Any, target: Target) -> int:
    """R of the target: its own, else that of the settings."""
    rank: int = target.r or settings.r
    return rank


def scaling_of(settings: Any, target: Target) -> float:
    """alpha / R of the target, or alpha / sqrt(R) with use_rslora."""
    rank = rank_of(settings, target)
    alpha: float = settings.alpha if target.alpha is None else target.alpha
    return alpha / (math.sqrt(rank) if getattr(settings, "use_rslora", False) else rank)
