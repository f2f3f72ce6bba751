"""GraLoRA, for linear layers and Conv1D, quantized or not."""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tunekit.adapters.base import LayerAdapter, Slot, Slots
from tunekit.adapters.folder.fields import LAYER_FIXED, PeftFields, PeftSide, same_names
from tunekit.adapters.method import Method
from tunekit.errors import AdapterError
from tunekit.recipe.adapters.gralora import GraloraSettings
from tunekit.records import Target


class Gralora(LayerAdapter[GraloraSettings]):
    """Low-rank blocks: block (j, n) of the update is s B_jn A_jn, s = alpha / (r + hybrid_r), each of rank R / k.

    Shapes: x (..., I) -> y (..., O); A (k, I / k, R): (input block n, its inputs, output block j and rank); B (k, R, O
    / k): (output block j, input block n and rank, its outputs). hybrid_r adds an ordinary LoRA, (H, I) and (O, H).
    Starts as the identity: B = 0. Raises: AdapterError if k does not divide R, I and O. Source: Jung et al. 2025, eq.
    6.
    """

    A: nn.Parameter
    B: nn.Parameter

    @classmethod
    def slots(cls, settings: GraloraSettings, target: Target) -> Slots:
        k, rank, inputs, outputs = settings.k, settings.r, target.in_features, target.out_features
        if inputs % k or outputs % k or rank % k:
            what = f"k {k} does not divide r {rank}, or '{target.name}' ({outputs} x {inputs})"
            raise AdapterError(what, "choose a k that divides all three numbers", key="adapter.k")
        slots = {
            "A": Slot("gralora_A", (k, inputs // k, rank)),
            "B": Slot("gralora_B", (k, rank, outputs // k), rate="b"),
        }
        if settings.hybrid_r:
            slots["plain_A"] = Slot("gralora_A_general.weight", (settings.hybrid_r, inputs))
            slots["plain_B"] = Slot("gralora_B_general.weight", (outputs, settings.hybrid_r), rate="b")
        return slots

    def initialise(self, generator: Generator) -> None:
        bound = 1 / math.sqrt(self.A.shape[1])  # LoRA's initialisation for the inputs of one block
        nn.init.uniform_(self.A, -bound, bound, generator=generator)
        nn.init.zeros_(self.B)
        if self.settings.hybrid_r:
            nn.init.kaiming_uniform_(self.plain_A, a=math.sqrt(5), generator=generator)
            nn.init.zeros_(self.plain_B)

    @property
    def scaling(self) -> float:
        """The scaling s."""
        return self.settings.alpha / (self.settings.r + self.settings.hybrid_r)

    def _blockwise(self, x: Tensor) -> Tensor:
        """The output (..., O) of all blocks for inputs (..., I), without dropout and scale."""
        k = self.settings.k
        blocks = x.reshape(*x.shape[:-1], k, -1)  # (..., n, I / k)
        low = torch.einsum("...ni,nir->...nr", blocks, self.A.to(x.dtype))
        low = low.reshape(*x.shape[:-1], k, k, -1).transpose(-3, -2)  # (..., j, n, R / k)
        low = low.reshape(*x.shape[:-1], k, -1)  # (..., j, R)
        return torch.einsum("...jr,jro->...jo", low, self.B.to(x.dtype)).flatten(-2)

    def update(self, x: Tensor) -> Tensor:
        update = self._blockwise(self.apply_dropout(x))
        if self.settings.hybrid_r:
            x = self.apply_dropout(x)
            update = update + F.linear(F.linear(x, self.plain_A.to(x.dtype)), self.plain_B.to(x.dtype))
        return update * self.scaling

    def delta(self) -> Tensor:
        delta = self._blockwise(torch.eye(self.target.in_features, device=self.A.device)).t()  # (O, I)
        if self.settings.hybrid_r:
            delta = delta + self.plain_B @ self.plain_A
        return delta * self.scaling


FIELDS: PeftFields = {
    **same_names(r=32, hybrid_r=0, alpha=64),
    "gralora_k": ("k", 2),
    "gralora_dropout": ("dropout", 0.0),
}
METHOD = Method(
    peft=PeftSide("GRALORA", GraloraSettings, FIELDS, LAYER_FIXED, absent=frozenset({"exclude_modules"})),
    layer=Gralora,
    tensors=("gralora_A_general.weight", "gralora_B_general.weight"),
)
