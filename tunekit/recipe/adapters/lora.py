"""`adapter: {method: lora}`: settings of LoRA and rsLoRA (Hu et al. 2021; Kalajdzievski 2023)."""

from pydantic import Field

from tunekit.recipe.bases.low_rank import LowRankSettings


class LoraSettings(LowRankSettings):
    """A low-rank update. `target_modules`: all-linear, a list of names or name endings, or one regular expression."""

    summary = "a low-rank update of each targeted matrix"
    first_lines = (("  r: 16", "a higher rank can learn more and needs more memory"), ("  alpha: 32", ""))

    lora_bias: bool = Field(False, description="the update of each layer has a trained bias, except in embeddings")
