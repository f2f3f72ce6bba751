"""VB-LoRA, for linear layers and Conv1D, quantized or not."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tunekit.adapters.base import SharedPart, Slot, Slots
from tunekit.adapters.blocks.divisors import divisor_conflicts
from tunekit.adapters.blocks.low_rank_layer import LowRankLayer
from tunekit.adapters.folder.fields import PeftSide, same_names
from tunekit.adapters.method import Conflict, Method
from tunekit.recipe.adapters.vblora import VbloraSettings
from tunekit.records import Target


class VectorBank(SharedPart[VbloraSettings]):
    """The trained vectors (H, L) from which the factors of every layer are composed."""

    vectors: nn.Parameter

    @classmethod
    def slots(cls, settings: VbloraSettings, targets: Sequence[Target]) -> Slots:
        return {"vectors": Slot("vblora_vector_bank", (settings.num_vectors, settings.vector_length))}

    def initialise(self, generator: Generator) -> None:
        bound = self.settings.init_vector_bank_bound
        nn.init.uniform_(self.vectors, -bound, bound, generator=generator)


class Vblora(LowRankLayer[VbloraSettings]):
    """Low-rank update from a vector bank: y = W x + B A x, where each piece of A and B is a mixture of k vectors of the
    bank.

    Shapes: x (..., I) -> y (..., O); logits of A (R, I / L, H), of B (O / L, R, H); A (R, I); B (O, R). At the start it
    already changes the output: if A or B were zero, the bank and the logits of the other factor would get no gradient.
    Source: Li et al. 2024, eq. 4 and 5.
    """

    starts_as_identity = False
    shared: VectorBank
    logits_a: nn.Parameter
    logits_b: nn.Parameter

    @classmethod
    def slots(cls, settings: VbloraSettings, target: Target) -> Slots:
        length, bank = settings.vector_length, settings.num_vectors
        return {
            "logits_a": Slot("vblora_logits_A", (settings.r, target.in_features // length, bank), decays=False),
            "logits_b": Slot("vblora_logits_B", (target.out_features // length, settings.r, bank), decays=False),
        }

    def initialise(self, generator: Generator) -> None:
        for logits in (self.logits_a, self.logits_b):
            nn.init.normal_(logits, 0, self.settings.init_logits_std, generator=generator)

    def mix(self, logits: Tensor) -> Tensor:
        """Mixes vectors of the bank: for each of the `logits` (..., H), the k vectors with the largest logits. Returns
        (..., L)."""
        largest, indices = logits.topk(self.settings.topk, dim=-1)
        vectors = self.shared.vectors.to(logits.device)[indices]  # (..., k, L)
        return (F.softmax(largest, dim=-1).unsqueeze(-1) * vectors).sum(-2)

    def factors(self) -> tuple[Tensor, Tensor]:
        rank = self.settings.r
        a = self.mix(self.logits_a).reshape(rank, -1)
        return a, self.mix(self.logits_b).transpose(1, 2).reshape(-1, rank)


def _conflicts(settings: VbloraSettings, targets: Sequence[Target], file: bool) -> list[Conflict]:
    problems = divisor_conflicts("vector_length", settings.vector_length, targets, inputs=True)
    if settings.topk > settings.num_vectors:
        problems.append(Conflict("topk", f"{settings.topk} is more than the bank's {settings.num_vectors} vectors", ""))
    return problems


FIELDS = {
    **same_names(r=4, num_vectors=256, vector_length=256, topk=2, init_vector_bank_bound=0.02, init_logits_std=0.1),
    "vblora_dropout": ("dropout", 0.0),
}
FIXED = {"bias": ("none",), "fan_in_fan_out": (False, True), "save_only_topk_weights": (False,)}
METHOD = Method(
    peft=PeftSide("VBLORA", VbloraSettings, FIELDS, FIXED), layer=Vblora, shared=VectorBank, conflicts=_conflicts
)
