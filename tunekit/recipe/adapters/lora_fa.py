"""`adapter: {method: lora_fa}`: settings of LoRA-FA (Zhang et al. 2023)."""

from tunekit.recipe.bases.low_rank import LowRankSettings


class LoraFaSettings(LowRankSettings):
    """LoRA with a frozen random A: half of the trained parameters, and the layers' inputs need not be stored."""

    summary = "lora with the matrix A frozen"
