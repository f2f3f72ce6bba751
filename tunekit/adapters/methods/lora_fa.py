"""LoRA-FA, of linear layers and Conv1D, packed or not."""

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
    """LoRA with A frozen as it was drawn: y = W x + s B A x, B alone is trained.

    The backward pass keeps A x (..., R) and not x (..., I). An embedding's A starts as 0 and so could never leave it.
    The folder is LoRA's: nothing in it depends on what was trained.
    Source: Zhang et al. 2023, section 3.1.
    """

    kinds = frozenset({"linear", "conv1d"})
    A: Tensor  # type: ignore[assignment]

    @classmethod
    def slots(cls, settings: LowRankSettings, target: Target) -> Slots:
        trained = super().slots(settings, target)
        return {**trained, "A": replace(trained["A"], kind="saved")}


class ExpertLoraFa(ExpertLora):
    """The same of fused expert weights."""

    A: Tensor  # type: ignore[assignment]

    @classmethod
    def slots(cls, settings: LowRankSettings, target: Target) -> Slots:
        trained = super().slots(settings, target)
        return {**trained, "A": replace(trained["A"], kind="saved")}


METHOD = replace(
    LORA, peft=lora_side(LoraFaSettings), layer=LoraFa, parameter=ExpertLoraFa, kernel=None, read_as="lora"
)
