"""`adapter: {method: shira}` settings of SHiRA, the sparse high-rank adapter (Bhardwaj et al. 2024)."""

from pydantic import Field

from tunekit.recipe.bases.section import Count, TargetedSettings, metamath_rate


class ShiraSettings(TargetedSettings):
    """A few single numbers of each matrix, drawn at random by the run's seed, are trained."""

    summary = "single numbers of each matrix, drawn at random"
    default_learning_rate = metamath_rate(3e-4, "shira/llama-3.2-3B-lr_0.0003-random_seed_42")

    r: Count = Field(32, description="r * (inputs + outputs) numbers are trained, as many as LoRA of rank r has")
