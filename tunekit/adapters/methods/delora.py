"""DeLoRA, for linear layers and Conv1D, quantized or not."""

from torch import Generator, Tensor, nn

from tunekit.adapters.base import Slot, Slots
from tunekit.adapters.blocks.low_rank_layer import LowRankLayer
from tunekit.adapters.folder.fields import ANY, Fixed, PeftFields, PeftSide
from tunekit.adapters.method import Method
from tunekit.recipe.adapters.delora import DeloraSettings
from tunekit.records import Target

SMALLEST_NORM = 1e-4  # smaller norms of factors are raised to this value, because B starts at 0


class Delora(LowRankLayer[DeloraSettings]):
    """Decoupled update: y = W x + (strength / r) sum over i of (b_i / |b_i|) (a_i / |a_i|)^T (c * x).

    Shapes: x (..., I) -> y (..., O); A (R, I) with rows a_i; B (O, R) with columns b_i; strength (1,); c (I,) the norms
    of W's columns, computed once and saved. Starts as the identity: B = 0. Weight decay does not apply to the strength.
    Source: Bini et al. 2025, eq. 6 and 8.
    """

    A: nn.Parameter
    B: nn.Parameter
    strength: nn.Parameter
    c: Tensor

    @classmethod
    def slots(cls, settings: DeloraSettings, target: Target) -> Slots:
        rank = target.r or settings.r
        return {
            "A": Slot("delora_A", (rank, target.in_features), first=None),
            "B": Slot("delora_B", (target.out_features, rank)),
            "strength": Slot("delora_lambda", (1,), decays=False, first=settings.delora_lambda),
            "c": Slot("delora_w_norm", (target.in_features,), kind="saved"),
        }

    def initialise(self, generator: Generator) -> None:
        super().initialise(generator)
        weight = self.base_weight()
        if weight.device.type != "meta":  # on the meta device the values are loaded afterwards
            self.c.copy_(weight.read().norm(dim=0))

    def factors(self) -> tuple[Tensor, Tensor]:
        norms = self.A.norm(dim=1).clamp(min=SMALLEST_NORM) * self.B.norm(dim=0).clamp(min=SMALLEST_NORM)  # (R,)
        return self.A * self.c, self.B * (self.strength / self.A.shape[0] / norms)


FIELDS: PeftFields = {"r": ("r", 8), "delora_lambda": ("delora_lambda", 15), "module_dropout": ("dropout", 0.0)}
FIXED: Fixed = {
    "bias": ("none",),
    "init_weights": (True, False),
    "lambda_pattern": ({}, ANY),  # initial values; the file contains the trained ones
}
METHOD = Method(peft=PeftSide("DELORA", DeloraSettings, FIELDS, FIXED), layer=Delora)
