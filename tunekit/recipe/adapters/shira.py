"""`adapter: {method: shira}`: settings of SHiRA, the sparse high-rank adapter (Bhardwaj et al. 2024)."""

from pydantic import Field

from tunekit.recipe.bases.section import Count, TargetedSettings, metamath_rate


class ShiraSettings(TargetedSettings):
    """Trains a few numbers of each matrix. The run's seed chooses these numbers at random."""

    summary = "a few numbers of each matrix, chosen at random"
    default_learning_rate = metamath_rate(3e-4, "shira/llama-3.2-3B-lr_0.0003-random_seed_42")

    r: Count = Field(
        32,
        description="r * (inputs + outputs) numbers of each matrix are trained; LoRA of rank r trains the same number",
    )
