"""HRA, for linear layers and Conv1D, quantized or not."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tunekit.adapters.base import LayerAdapter, Slot, Slots
from tunekit.adapters.folder.fields import Fixed, PeftFields, PeftSide
from tunekit.adapters.method import Method
from tunekit.recipe.adapters.hra import HraSettings
from tunekit.records import Target


class Hra(LayerAdapter[HraSettings]):
    """Reflected inputs: y = W H_1 ... H_R x, H_i = 1 - 2 u_i u_i^T with unit vectors u_i.

    The chain is 1 - U M^-1 U^T, M = 1/2 + strict upper triangle of U^T U (or, with orthogonal vectors, U^T U / 2). x is
    therefore multiplied by two thin matrices instead of R reflections.
    Shapes: x (..., I) -> y (..., O); U (I, R). At the start each vector occurs twice, so that the layer equals the base
    up to rounding. This does not hold if R is odd or the vectors are made orthogonal. Weight decay does not apply,
    because it would only change the size of U.
    Source: Yuan et al. 2024, eq. 4 and 7; the compact form is from Schreiber and Van Loan 1989.
    """

    starts_as_identity = False
    u: nn.Parameter

    @classmethod
    def slots(cls, settings: HraSettings, target: Target) -> Slots:
        return {"u": Slot("hra_u", (target.in_features, target.r or settings.r), decays=False, first=None)}

    def initialise(self, generator: Generator) -> None:
        super().initialise(generator)
        if self.u.shape[1] % 2 == 0 and not self.settings.orthogonal:
            self.u.data = self.u.data[:, ::2].repeat_interleave(2, 1)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Two factors: U with unit columns, (I, R), and M^-1 U^T, (R, I)."""
        unit = self.u / self.u.norm(dim=0)
        products = unit.t() @ unit  # (R, R)
        half = torch.eye(unit.shape[1], dtype=unit.dtype, device=unit.device) / 2
        inner = products / 2 if self.settings.orthogonal else products.triu(1) + half
        # solve would wait for an error check; NaN stops the step
        return unit, torch.linalg.solve_ex(inner, unit.t())[0]

    def adapted(self, x: Tensor) -> Tensor:
        unit, inverse = (factor.to(x.dtype) for factor in self.factors())
        return self.base_output(x - F.linear(F.linear(x, inverse), unit))

    def low_rank(self, base_matrix: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        unit, inverse = self.factors()
        return inverse, -(base_matrix().to(unit.device) @ unit)

    def merged_weight(self, weight: Tensor) -> Tensor:
        unit, inverse = (factor.to(weight.device) for factor in self.factors())
        return weight - (weight @ unit) @ inverse


FIELDS: PeftFields = {"r": ("r", 8), "apply_GS": ("orthogonal", False)}
FIXED: Fixed = {"bias": ("none",), "init_weights": (True, False)}
METHOD = Method(peft=PeftSide("HRA", HraSettings, FIELDS, FIXED), layer=Hra)
