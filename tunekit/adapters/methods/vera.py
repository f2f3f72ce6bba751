"""VeRA, for linear layers and Conv1D, quantized or not."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tunekit.adapters.base import LayerAdapter, SharedPart, Slot, Slots
from tunekit.adapters.blocks.projections import kaiming_uniform, projection_slot
from tunekit.adapters.folder.fields import ANY, LAYER_FIXED, PeftSide, same_names
from tunekit.adapters.method import Method
from tunekit.recipe.adapters.vera import VeraSettings
from tunekit.records import Target


class VeraProjections(SharedPart[VeraSettings]):
    """The frozen random matrices A (R, maximum I) and B (maximum O, R) that all layers share. Each layer uses the part
    that has its size."""

    A: Tensor
    B: Tensor

    @classmethod
    def slots(cls, settings: VeraSettings, targets: Sequence[Target]) -> Slots:
        inputs, outputs = max(t.in_features for t in targets), max(t.out_features for t in targets)
        return {
            "A": projection_slot(settings.save_projection, "vera_A", (settings.r, inputs)),
            "B": projection_slot(settings.save_projection, "vera_B", (outputs, settings.r)),
        }

    def initialise(self, generator: Generator) -> None:
        generator = Generator("cpu").manual_seed(self.settings.projection_prng_key)
        for matrix in (self.A, self.B):
            matrix.copy_(kaiming_uniform(tuple(matrix.shape), generator))


class Vera(LayerAdapter[VeraSettings]):
    """Scales of one random update: y = W x + b * (B (d * (A x))).

    Shapes: x (..., I) -> y (..., O); A (R, I); B (O, R); d (R,); b (O,). Starts as the identity: b = 0. Source:
    Kopiczko et al. 2024, eq. 2.
    """

    shared: VeraProjections
    d: nn.Parameter
    b: nn.Parameter

    @classmethod
    def slots(cls, settings: VeraSettings, target: Target) -> Slots:
        return {
            "d": Slot("vera_lambda_d", (settings.r,), decays=False, first=settings.d_initial),
            "b": Slot("vera_lambda_b", (target.out_features,), decays=False),
        }

    def matrices(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (O, R) on the device and in the dtype of `like`."""
        a, b = self.shared.A[:, : self.target.in_features], self.shared.B[: self.target.out_features]
        return a.to(like), b.to(like)

    def update(self, x: Tensor) -> Tensor:
        a, b = self.matrices(x)
        low = F.linear(self.apply_dropout(x), a) * self.d.to(x.dtype)  # (..., R)
        return F.linear(low, b) * self.b.to(x.dtype)

    def low_rank(self, base_matrix: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        a, b = self.matrices(self.b)
        return self.d[:, None] * a, self.b[:, None] * b

    def delta(self) -> Tensor:
        a, b = self.matrices(self.b)
        return (self.b[:, None] * b) @ (self.d[:, None] * a)


FIELDS = {
    **same_names(r=256, projection_prng_key=0, save_projection=True, d_initial=0.1),
    "vera_dropout": ("dropout", 0.0),
}
FIXED = {**LAYER_FIXED, "init_weights": (True, ANY)}
METHOD = Method(
    peft=PeftSide("VERA", VeraSettings, FIELDS, FIXED, absent=frozenset({"exclude_modules"})),
    layer=Vera,
    shared=VeraProjections,
)
