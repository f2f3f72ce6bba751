"""RandLoRA, for linear layers and Conv1D, quantized or not."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tunekit.adapters.base import LayerAdapter, SharedPart, Slot, Slots
from tunekit.adapters.blocks.projections import kaiming_uniform, projection_slot, ternary
from tunekit.adapters.folder.fields import ANY, LAYER_FIXED, PeftSide, same_names
from tunekit.adapters.method import Method
from tunekit.recipe.adapters.randlora import RandloraSettings
from tunekit.records import Target


class RandloraProjections(SharedPart[RandloraSettings]):
    """The frozen random A (R, 1, S) and B (L, N, R), scaled to a standard deviation of 1.

    S is the smaller and L the larger of the maximum input size and the maximum output size. N matrices of rank R
    together have rank S.
    """

    A: Tensor
    B: Tensor

    @classmethod
    def slots(cls, settings: RandloraSettings, targets: Sequence[Target]) -> Slots:
        sides = max(t.in_features for t in targets), max(t.out_features for t in targets)
        small, large, rank = min(sides), max(sides), settings.r
        return {
            "A": projection_slot(settings.save_projection, "randlora_A", (rank, 1, small)),
            "B": projection_slot(settings.save_projection, "randlora_B", (large, -(-small // rank), rank)),
        }

    def initialise(self, generator: Generator) -> None:
        generator = Generator("cpu").manual_seed(self.settings.projection_prng_key)
        a, b = tuple(self.A.shape), tuple(self.B.shape)
        if self.settings.sparse or self.settings.very_sparse:
            sparsity = math.sqrt(a[2]) if self.settings.very_sparse else 3
            values = ternary(a, generator, sparsity), ternary(b, generator, sparsity)
        else:
            # PEFT draws in bfloat16 on most devices: a file without the matrices means these numbers.
            saved = self.settings.save_projection
            form = (math.sqrt(2), torch.float32) if saved else (math.sqrt(2 / 6), torch.bfloat16)
            first = kaiming_uniform(a, generator, *form)
            pieces = [kaiming_uniform((b[0], 1, b[2]), generator, *form) for _ in range(b[1])]
            values = first, torch.cat(pieces, dim=1)
        for matrix, value in zip((self.A, self.B), values, strict=True):
            matrix.copy_(value / value.std())


class Randlora(LayerAdapter[RandloraSettings]):
    """Scaled sums of random updates: y = W x + (alpha / r) B (lambda * A * gamma) x, transposed if O < I.

    Shapes: x (..., I) -> y (..., O); lambda (R, N); gamma (N, s); lambda * A * gamma (R N, s); B (l, N R). s is the
    smaller and l the larger of I and O; N is s / R rounded up. Starts as the identity: lambda = 0. Source: Albert et
    al. 2025, eq. 4.
    """

    shared: RandloraProjections
    lambdas: nn.Parameter
    gammas: nn.Parameter

    @classmethod
    def slots(cls, settings: RandloraSettings, target: Target) -> Slots:
        small = min(target.in_features, target.out_features)
        bases = -(-small // settings.r)
        return {
            "lambdas": Slot("randlora_lambda", (settings.r, bases), decays=False),
            "gammas": Slot("randlora_gamma", (bases, small), decays=False, first=1 / max(bases, small)),
        }

    def factors(self, lambdas: Tensor, gammas: Tensor) -> tuple[Tensor, Tensor]:
        """The first factor of the update (N R, I) and the second one (O, N R), in the dtype of `lambdas`."""
        bases, small = gammas.shape
        large = max(self.target.in_features, self.target.out_features)
        a, b = self.shared.A[:, :, :small].to(lambdas), self.shared.B[:large, :bases].to(lambdas)
        scaled = (lambdas[:, :, None] * a * gammas).flatten(end_dim=1)  # (R N, s)
        if small == self.target.in_features:
            return scaled, b.flatten(start_dim=1)
        return b.flatten(start_dim=1).t(), scaled.t()

    def update(self, x: Tensor) -> Tensor:
        first, second = self.factors(self.lambdas.to(x.dtype), self.gammas.to(x.dtype))
        low = F.linear(self.apply_dropout(x), first)  # (..., N R)
        return F.linear(low, second) * (self.settings.alpha / self.settings.r)

    def delta(self) -> Tensor:
        first, second = self.factors(self.lambdas, self.gammas)
        return second @ first * (self.settings.alpha / self.settings.r)


FIELDS = {
    **same_names(r=32, projection_prng_key=0, save_projection=True, sparse=False, very_sparse=False),
    "randlora_alpha": ("alpha", 640),
    "randlora_dropout": ("dropout", 0.0),
}
FIXED = {**LAYER_FIXED, "init_weights": (True, ANY)}
METHOD = Method(
    peft=PeftSide(
        "RANDLORA", RandloraSettings, FIELDS, FIXED, absent=frozenset({"exclude_modules"}), refuses_kernel_layers=True
    ),
    layer=Randlora,
    shared=RandloraProjections,
    repeats_shared=True,
)
