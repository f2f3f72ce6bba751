"""LoRA and rsLoRA.  Comes in: a linear layer, a Conv1D or an embedding, packed or not.  Next: attach.py, folder.py."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunekit.adapters.base import LayerAdapter, Slot
from tunekit.adapters.blocks.expert_lora import ExpertLora
from tunekit.adapters.blocks.lora_fields import LORA_FIELDS, LORA_FIXED, misfits, saved_modules, target_parameters
from tunekit.adapters.folder.fields import PeftSide
from tunekit.adapters.method import Method
from tunekit.adapters.starts.start import begin
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.low_rank import LowRankSettings
from tunekit.records import Target


class Lora(LayerAdapter):
    """Low-rank update: y = W x + s B A x, s = alpha / r, or alpha / sqrt(r) with rsLoRA.

    Shapes: x (..., I) -> y (..., O); A (R, I); B (O, R).  Of an embedding: ids x (...), A (R, V), B (D, R), y = (W + s
    (B A)^T)[x].
    Units: alpha unitless.    Starts as the identity: B = 0 (embedding: A = 0), or as adapters/starts/ say.
    A and B are cast to x's dtype.
    Source: Hu et al. 2021, eq. 3; Kalajdzievski 2023.
    """

    kinds = frozenset({"linear", "conv1d", "embedding"})
    settings: LowRankSettings
    A: nn.Parameter
    B: nn.Parameter
    own_bias: nn.Parameter  # where biases are trained: in place of the base's
    start_A: Tensor  # A' (R, I) and B' (O, R) of starts that move a part of W into A and B
    start_B: Tensor
    fused: Any = None  # fused.py's way to compute this layer together with its neighbours

    @classmethod
    def slots(cls, settings: LowRankSettings, target: Target) -> dict[str, Slot]:
        rank, inputs, outputs = target.r or settings.r, target.in_features, target.out_features
        if target.kind == "embedding":
            a = Slot("lora_embedding_A", (rank, inputs), rate="embedding")
            return {"A": a, "B": Slot("lora_embedding_B", (outputs, rank), rate="embedding")}
        slots = {"A": Slot("lora_A.weight", (rank, inputs)), "B": Slot("lora_B.weight", (outputs, rank), rate="b")}
        if settings.bias != "none" and target.has_bias:
            slots["own_bias"] = Slot("base_layer.bias", (outputs,), decays=False)
        if settings.start.moves_weights:  # y = W x + s (B A - B' A') x: exactly W x at the start, and W is not touched
            slots["start_A"] = Slot("start_A", (rank, inputs), kind="resume")
            slots["start_B"] = Slot("start_B", (outputs, rank), kind="resume")
        return slots

    def initialise(self, generator: torch.Generator) -> None:
        if self.target.kind == "embedding":
            nn.init.zeros_(self.A)
            nn.init.normal_(self.B, generator=generator)
        else:
            self.begin(generator)
        if "own_bias" in self.held:
            bias = self.base_layer.bias
            self.own_bias.data.copy_(torch.zeros_like(self.own_bias) if bias.is_meta else bias.detach())

    def begin(self, generator: torch.Generator, evidence: Any = None) -> None:
        """Fill A and B as the recipe's start says."""
        begin(self, generator, evidence)

    @property
    def scaling(self) -> float:
        """s."""
        rank, alpha = self.target.r or self.settings.r, self.target.alpha
        alpha = self.settings.alpha if alpha is None else alpha
        return alpha / math.sqrt(rank) if self.settings.use_rslora else alpha / rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B; where a start has moved weights, factors of B A - B' A': [A; A - A'] (2R, I), [B - B', B'] (O, 2R).

        So written, nothing large cancels, in whatever precision they are multiplied.
        """
        if "start_A" not in self.held:
            return self.A, self.B
        return torch.cat([self.A, self.A - self.start_A]), torch.cat([self.B - self.start_B, self.start_B], dim=1)

    def delta(self) -> Tensor:
        """s B A as a change of the matrix: (O, I), of an embedding (V, D); where A and B lie."""
        a, b = self.factors()
        delta = b.detach() @ a.detach() * self.scaling
        return delta.t() if self.target.kind == "embedding" else delta

    def update(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """s B A x, (..., O) in `dtype`."""
        if self.target.kind == "embedding":
            rows = F.embedding(x, self.A.t().to(dtype), self.base_layer.padding_idx)  # (..., R)
            scale = self.scaling * getattr(self.base_layer, "embed_scale", 1.0)  # Gemma multiplies W[x] as well
            return F.linear(rows, self.B.to(dtype)) * scale
        x = F.dropout(x, self.settings.dropout, self.training)
        a, b = self.factors()
        low = F.linear(x, a.to(x.dtype))  # (..., R)
        return F.linear(low, b.to(x.dtype)) * self.scaling

    def used_bias(self) -> Tensor | None:
        """The bias in use (O,)."""
        bias: Tensor | None = self.own_bias if "own_bias" in self.held else getattr(self.base_layer, "bias", None)
        return bias

    def base_output(self, x: Tensor) -> Tensor:
        """W x with the bias in use, (..., O)."""
        y: Tensor = self.base_layer(x)
        return y + (self.own_bias - self.base_layer.bias).to(y.dtype) if "own_bias" in self.held else y

    def adapted(self, x: Tensor) -> Tensor:
        fused: Tensor | None = None if self.fused is None else self.fused.product(self, x)
        if fused is not None:
            return fused
        y = self.base_output(x)
        return y + self.update(x, y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        bias = self.own_bias.detach().to(weight.device) if "own_bias" in self.held else bias
        return weight + self.delta().to(weight.device), bias


METHOD = Method(
    peft=PeftSide("LORA", LoraSettings, LORA_FIELDS, LORA_FIXED),
    layer=Lora,
    copies=saved_modules,
    parameter=ExpertLora,
    parameters=target_parameters,
    misfits=misfits,
)
