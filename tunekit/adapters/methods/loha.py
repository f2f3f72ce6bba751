"""LoHa.  Comes in: a linear layer or a Conv1D, packed or not.  Next: attach.py, folder.py."""

from __future__ import annotations

import math
from typing import Any

from torch import Generator, Tensor, nn

from tunekit.adapters.base import LayerAdapter, Slot
from tunekit.adapters.blocks.delta_product import delta_product
from tunekit.adapters.folder.fields import ANY, PeftSide
from tunekit.adapters.method import Method
from tunekit.recipe.adapters.loha import LohaSettings
from tunekit.records import Target


class Loha(LayerAdapter):
    """Hadamard product of two low-rank updates: y = W x + (alpha / r) ((A1 B1) * (A2 B2)) x.

    Shapes: x (..., I) -> y (..., O); A1, A2 (O, R); B1, B2 (R, I).    Starts as the identity: B2 = 0.
    Source: Hyeon-Woo et al. 2022, eq. 3.
    """

    settings: LohaSettings
    a1: nn.Parameter
    b1: nn.Parameter
    a2: nn.Parameter
    b2: nn.Parameter

    @classmethod
    def slots(cls, settings: LohaSettings, target: Target) -> dict[str, Slot]:
        rank, inputs, outputs = target.r or settings.r, target.in_features, target.out_features
        return {
            "a1": Slot("hada_w1_a", (outputs, rank)),
            "b1": Slot("hada_w1_b", (rank, inputs)),
            "a2": Slot("hada_w2_a", (outputs, rank)),
            "b2": Slot("hada_w2_b", (rank, inputs)),
        }

    def initialise(self, generator: Generator) -> None:
        for factor in (self.a1, self.b1, self.a2):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.b2)

    def delta(self, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        """The update (O, I)."""
        alpha = self.settings.alpha if self.target.alpha is None else self.target.alpha
        return (a1 @ b1) * (a2 @ b2) * (alpha / (self.target.r or self.settings.r))

    def adapted(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)  # (..., O)
        return y + delta_product(x, self.delta, self.a1, self.b1, self.a2, self.b2)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factors = (factor.detach() for factor in (self.a1, self.b1, self.a2, self.b2))
        return weight + self.delta(*factors).to(weight.device), bias


FIELDS: dict[str, tuple[str, Any]] = {
    "r": ("r", 8),
    "alpha": ("alpha", 8),
    "target_modules": ("target_modules", None),
    "exclude_modules": ("exclude_modules", None),
    "rank_pattern": ("rank_pattern", {}),
    "alpha_pattern": ("alpha_pattern", {}),
}
FIXED: dict[str, tuple[Any, ...]] = {
    "init_weights": (True, False),
    "module_dropout": (0.0, ANY),  # of peft's training alone, as the next one
    "rank_dropout": (0.0, ANY),
    "use_effective_conv2d": (False, True),  # of convolutions, which are not adapted
}
METHOD = Method(peft=PeftSide("LOHA", LohaSettings, FIELDS, FIXED), layer=Loha)
