"""`adapter: {method: randlora}` settings of RandLoRA (Albert et al. 2025)."""

from pydantic import Field

from tunekit.recipe.bases import fields
from tunekit.recipe.bases.section import Count, CountOrZero, Fraction, NotNegative, TargetedSettings


class RandloraSettings(TargetedSettings):
    """Sums of frozen random low-rank matrices, of full rank together, each scaled by trained diagonals. The initial
    values are those of PEFT's RandLoraConfig, with which its MetaMathQA comparison was run."""

    summary = "trained scales of many frozen random updates"

    r: Count = Field(32, description="rank of each random matrix; a smaller one means more trained numbers")
    alpha: NotNegative = Field(640.0, description="the update is scaled by alpha / r")
    dropout: Fraction = fields.DROPOUT
    sparse: bool = Field(False, description="random matrices of -1, 0 and 1, of which 0 two thirds")
    very_sparse: bool = Field(False, description="the same with one in sqrt(D) not 0, D the smaller side")
    projection_prng_key: CountOrZero = Field(0, description="seed of the frozen random matrices, as PEFT draws them")
    save_projection: bool = Field(True, description="whether the adapter's file holds the frozen matrices")
