"""LoHa, for linear layers and Conv1D, quantized or not."""

from torch import Tensor, nn

from tunekit.adapters.base import Slot, Slots
from tunekit.adapters.blocks.delta_product import DeltaLayer
from tunekit.adapters.blocks.low_rank_layer import scaling_of
from tunekit.adapters.folder.fields import ANY, Fixed, PeftSide, same_names
from tunekit.adapters.method import Method
from tunekit.recipe.adapters.loha import LohaSettings
from tunekit.records import Target


class Loha(DeltaLayer[LohaSettings]):
    """Hadamard product of two low-rank updates: y = W x + (alpha / r) ((A1 B1) * (A2 B2)) x.

    Shapes: x (..., I) -> y (..., O); A1, A2 (O, R); B1, B2 (R, I). Starts as the identity: B2 = 0. Source: Hyeon-Woo
    et al. 2022, eq. 3.
    """

    a1: nn.Parameter
    b1: nn.Parameter
    a2: nn.Parameter
    b2: nn.Parameter

    @classmethod
    def slots(cls, settings: LohaSettings, target: Target) -> Slots:
        rank, inputs, outputs = target.r or settings.r, target.in_features, target.out_features
        return {
            "a1": Slot("hada_w1_a", (outputs, rank), first=None),
            "b1": Slot("hada_w1_b", (rank, inputs), first=None),
            "a2": Slot("hada_w2_a", (outputs, rank), first=None),
            "b2": Slot("hada_w2_b", (rank, inputs)),
        }

    def make(self, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        """The update (O, I)."""
        return (a1 @ b1) * (a2 @ b2) * scaling_of(self.target, self.settings.r, self.settings.alpha)


FIXED: Fixed = {
    "init_weights": (True, False),
    "module_dropout": (0.0, ANY),  # used only in peft's training, like the next one
    "rank_dropout": (0.0, ANY),
    "use_effective_conv2d": (False, True),  # for convolutions, which are not adapted
}
METHOD = Method(peft=PeftSide("LOHA", LohaSettings, same_names(r=8, alpha=8), FIXED), layer=Loha)
