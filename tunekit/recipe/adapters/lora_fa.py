"""`adapter: {method: lora_fa}` settings of LoRA-FA (Zhang et al. 2023)."""

from tunekit.recipe.bases.low_rank import LowRankSettings


class LoraFaSettings(LowRankSettings):
    """LoRA whose A stays as it was drawn: half the trained parameters, and no stored inputs of full width."""

    summary = "lora with the matrix A frozen"
