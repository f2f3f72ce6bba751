"""LoRA-FA, for linear layers and Conv1D, quantized or not."""

from dataclasses import replace

from torch import Tensor

from tunekit.adapters.base import Slots
from tunekit.adapters.blocks.expert_lora import ExpertLora
from tunekit.adapters.blocks.lora_fields import lora_side
from tunekit.adapters.methods.lora import METHOD as LORA
from tunekit.adapters.methods.lora import Lora
from tunekit.recipe.adapters.lora_fa import LoraFaSettings
from tunekit.recipe.bases.low_rank import LowRankSettings
from tunekit.records import Target


class LoraFa(Lora):
    """LoRA with its random A frozen: y = W x + s B A x, only B is trained.

    The backward pass saves A x (..., R) instead of x (..., I). An embedding is excluded: its A starts as 0 and would
    stay 0. The result is saved as an ordinary LoRA folder, because folders do not record which factors were trained.
    Source: Zhang et al. 2023, section 3.1.
    """

    kinds = frozenset({"linear", "conv1d"})
    A: Tensor  # type: ignore[assignment]

    @classmethod
    def slots(cls, settings: LowRankSettings, target: Target) -> Slots:
        slots = super().slots(settings, target)
        return {**slots, "A": replace(slots["A"], kind="saved")}


class ExpertLoraFa(ExpertLora):
    """LoRA-FA of fused expert weights."""

    A: Tensor  # type: ignore[assignment]

    @classmethod
    def slots(cls, settings: LowRankSettings, target: Target) -> Slots:
        slots = super().slots(settings, target)
        return {**slots, "A": replace(slots["A"], kind="saved")}


METHOD = replace(
    LORA, peft=lora_side(LoraFaSettings), layer=LoraFa, parameter=ExpertLoraFa, kernel=None, read_as="lora"
)
