"""LoRA of fused expert weights.  Comes in: a parameter (E, O, I), or (E, I, O).  Next: fused_parameters.py, lora.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn

from tunekit.adapters.base import Slot
from tunekit.adapters.expert_parameters import Factors, ParameterAdapter
from tunekit.recipe.low_rank import LowRankSettings
from tunekit.records import Target


class ExpertLora(ParameterAdapter):
    """A low-rank update of every expert's matrix: y = W_e x + s B_e A_e x, s as LoRA's.

    Shapes: A (R E, I), expert by expert; B (O, R E), rank by rank: as PEFT stores them.
    Starts as the identity: B = 0.
    PEFT wraps the adapted parameters of one module around each other, the first one innermost; only their tensors'
    names say which is which.
    Source: Hu et al. 2021, eq. 3.
    """

    settings: LowRankSettings
    A: nn.Parameter
    B: nn.Parameter

    @classmethod
    def slots(cls, settings: LowRankSettings, target: Target) -> dict[str, Slot]:
        rank = (target.r or settings.r) * (target.experts or 1)
        wrapped = "base_layer." * target.wrapped
        return {
            "A": Slot(f"{wrapped}lora_A.weight", (rank, target.in_features)),
            "B": Slot(f"{wrapped}lora_B.weight", (target.out_features, rank), rate="b"),
        }

    @classmethod
    def file_key(cls, name: str) -> str:
        """Without the parameter's own name, which PEFT's files do not have."""
        place, _, factor = name.rpartition(".lora_")
        inner = place
        while inner.endswith(".base_layer"):
            inner = inner.removesuffix(".base_layer")
        owner = inner.rpartition(".")[0]
        return f"{cls.file_prefix}{owner}{place.removeprefix(inner)}.lora_{factor}"

    def initialise(self, generator: Generator) -> None:
        if self.settings.start.method == "gaussian":
            rank = self.target.r or self.settings.r
            self.A.data.copy_(torch.randn(self.A.shape, generator=generator) / rank)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.B)

    @property
    def scaling(self) -> float:
        """s."""
        rank, alpha = self.target.r or self.settings.r, self.target.alpha
        alpha = self.settings.alpha if alpha is None else alpha
        return alpha / math.sqrt(rank) if self.settings.use_rslora else alpha / rank

    def factors(self, index: Any) -> Factors:
        experts = self.target.experts or 1
        a = self.A.reshape(experts, -1, self.A.shape[1])[index]  # (..., R, I)
        b = (self.B * self.scaling).reshape(self.B.shape[0], -1, experts).permute(2, 0, 1)[index]  # (..., O, R)
        return (a.transpose(-2, -1), b.transpose(-2, -1)) if self.target.transposed else (b, a)


class ExpertLoraFa(ExpertLora):
    """The same with A frozen as it was drawn."""

    A: Tensor  # type: ignore[assignment]

    @classmethod
    def slots(cls, settings: Any, target: Target) -> dict[str, Slot]:
        trained = super().slots(settings, target)
        return {**trained, "A": Slot(trained["A"].suffix, trained["A"].shape, kind="saved")}
