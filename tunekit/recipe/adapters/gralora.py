"""`adapter: {method: gralora}` settings of GraLoRA, granular low-rank adaptation (Jung et al. 2025)."""

from pydantic import Field

from tunekit.recipe.bases import fields
from tunekit.recipe.bases.section import Count, CountOrZero, Fraction, NotNegative, TargetedSettings, metamath_rate


class GraloraSettings(TargetedSettings):
    """Each matrix in k x k blocks, each with a low-rank update of its own of rank r / k."""

    summary = "a low-rank update of each of k x k blocks"
    default_learning_rate = metamath_rate(2e-4, "gralora/llama-3.2-3B-rank32")

    r: Count = Field(32, description="rank; k divides it")
    k: Count = Field(2, description="blocks on either side; it divides every layer's inputs and outputs")
    hybrid_r: CountOrZero = Field(0, description="rank of a plain LoRA beside the blocks")
    alpha: NotNegative = Field(64.0, description="the update is scaled by alpha / (r + hybrid_r)")
    dropout: Fraction = fields.DROPOUT
