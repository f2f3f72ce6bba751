"""DeLoRA.  Comes in: a linear layer or a Conv1D, packed or not.  Next: attach.py, folder.py."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tunekit.adapters.base import LayerAdapter, Slot
from tunekit.adapters.folder.fields import ANY, PeftSide
from tunekit.adapters.method import Method
from tunekit.model.quantized.weights import weight_of
from tunekit.recipe.adapters.delora import DeloraSettings
from tunekit.records import Target

SMALLEST_NORM = 1e-4  # of a factor: B starts at 0


class Delora(LayerAdapter):
    """Decoupled update: y = W x + (strength / r) sum over i of (b_i / |b_i|) (a_i / |a_i|)^T (c * x).

    Shapes: x (..., I) -> y (..., O); A (R, I) with rows a_i; B (O, R) with columns b_i; strength (1,); c (I,) the norms
    of W's columns, taken once and saved.    Starts as the identity: B = 0.    The strength does not decay.
    Source: Bini et al. 2025, eq. 6 and 8.
    """

    settings: DeloraSettings
    A: nn.Parameter
    B: nn.Parameter
    strength: nn.Parameter
    c: Tensor

    @classmethod
    def slots(cls, settings: DeloraSettings, target: Target) -> dict[str, Slot]:
        rank = target.r or settings.r
        return {
            "A": Slot("delora_A", (rank, target.in_features)),
            "B": Slot("delora_B", (target.out_features, rank)),
            "strength": Slot("delora_lambda", (1,), decays=False),
            "c": Slot("delora_w_norm", (target.in_features,), kind="saved"),
        }

    def initialise(self, generator: Generator) -> None:
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.B)
        nn.init.constant_(self.strength, self.settings.delora_lambda)
        weight = weight_of(self.base_layer)
        assert weight is not None
        if weight.device.type == "meta":
            self.c.zero_()  # its values are loaded afterwards
        else:
            self.c.copy_(weight.read().norm(dim=0))

    def factors(self) -> tuple[Tensor, Tensor]:
        """(R, I) and (O, R), whose product is the update."""
        norms = self.A.norm(dim=1).clamp(min=SMALLEST_NORM) * self.B.norm(dim=0).clamp(min=SMALLEST_NORM)  # (R,)
        return self.A * self.c, self.B * (self.strength / self.A.shape[0] / norms)

    def adapted(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)  # (..., O)
        a, b = (factor.to(x.dtype) for factor in self.factors())
        return y + F.linear(F.linear(F.dropout(x, self.settings.dropout, self.training), a), b)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a, b = (factor.detach() for factor in self.factors())
        return weight + (b @ a).to(weight.device), bias


FIELDS: dict[str, tuple[str, Any]] = {
    "r": ("r", 8),
    "delora_lambda": ("delora_lambda", 15),
    "module_dropout": ("dropout", 0.0),
    "target_modules": ("target_modules", None),
    "exclude_modules": ("exclude_modules", None),
    "rank_pattern": ("rank_pattern", {}),
}
FIXED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_weights": (True, False),
    "lambda_pattern": ({}, ANY),  # of the start; the trained strengths are in the file
}
METHOD = Method(peft=PeftSide("DELORA", DeloraSettings, FIELDS, FIXED), layer=Delora)
