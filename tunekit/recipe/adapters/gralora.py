"""`adapter: {method: gralora}`: settings of GraLoRA, granular low-rank adaptation (Jung et al. 2025)."""

from pydantic import Field

from tunekit.recipe.bases import fields
from tunekit.recipe.bases.section import Count, CountOrZero, Fraction, NotNegative, TargetedSettings, metamath_rate


class GraloraSettings(TargetedSettings):
    """Each matrix is divided into k x k blocks. Each block has a separate low-rank update, of rank r / k."""

    summary = "a low-rank update of each of k x k blocks"
    default_learning_rate = metamath_rate(2e-4, "gralora/llama-3.2-3B-rank32")

    r: Count = Field(32, description="rank; it must be a multiple of k")
    k: Count = Field(2, description="number of blocks per side; it must divide the inputs and outputs of every layer")
    hybrid_r: CountOrZero = Field(0, description="rank of an additional plain LoRA")
    alpha: NotNegative = Field(64.0, description="the update is scaled by alpha / (r + hybrid_r)")
    dropout: Fraction = fields.DROPOUT
