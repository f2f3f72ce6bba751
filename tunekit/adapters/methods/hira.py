"""HiRA, for linear layers, Conv1D and embeddings, quantized or not."""

import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tunekit.adapters.base import Slot, Slots
from tunekit.adapters.blocks.delta_product import DeltaLayer
from tunekit.adapters.folder.fields import ANY, Fixed, PeftFields, PeftSide
from tunekit.adapters.method import Method
from tunekit.recipe.adapters.hira import HiraSettings
from tunekit.records import Target


class Hira(DeltaLayer[HiraSettings]):
    """Hadamard update: y = (W + W * (B A)) x.

    Shapes: x (..., I) -> y (..., O); A (R, I); B (O, R). For an embedding: ids x (...), A (R, V), B (D, R), y = W[x] +
    W[x] * (B A)^T[x]. Starts as the identity: B = 0 (embedding: A = 0). Source: Huang et al. 2025, eq. 3.
    """

    kinds = frozenset({"linear", "conv1d", "embedding"})
    A: nn.Parameter
    B: nn.Parameter

    @classmethod
    def slots(cls, settings: HiraSettings, target: Target) -> Slots:
        rank, inputs, outputs = target.r or settings.r, target.in_features, target.out_features
        infix, first = ("embedding_", 0.0) if target.kind == "embedding" else ("", None)
        return {"A": Slot(f"hira_{infix}A", (rank, inputs), first=first), "B": Slot(f"hira_{infix}B", (outputs, rank))}

    def initialise(self, generator: Generator) -> None:
        super().initialise(generator)
        if self.target.kind == "embedding":
            nn.init.normal_(self.B, generator=generator)

    def make(self, a: Tensor, b: Tensor) -> Tensor:
        """The update W * (B A) of this layer's matrix, (O, I)."""
        return self.base_weight().read(a.dtype) * (b @ a)

    def update(self, x: Tensor) -> Tensor:
        return super().update(self.apply_dropout(x))

    def adapted(self, x: Tensor) -> Tensor:
        if self.target.kind != "embedding":
            return super().adapted(x)
        y = self.base_output(x)
        rows = F.embedding(x, self.A.t().to(y.dtype), self.base_layer.padding_idx)  # (..., R)
        return y + y * F.linear(rows, self.B.to(y.dtype))

    def merged_weight(self, weight: Tensor) -> Tensor:
        factor = (self.B @ self.A).to(weight.device)  # (O, I), for an embedding (D, V)
        return weight + weight * (factor.t() if self.target.kind == "embedding" else factor)


FIELDS: PeftFields = {"r": ("r", 32), "hira_dropout": ("dropout", 0.0)}
FIXED: Fixed = {
    "fan_in_fan_out": (False, True),  # the layer's own class decides
    "init_weights": (True, False, None, "gaussian"),
    "rank_pattern": ({}, ANY),  # peft 0.21.2 ignores it: every layer has rank r
}
METHOD = Method(peft=PeftSide("HIRA", HiraSettings, FIELDS, FIXED), layer=Hira)
