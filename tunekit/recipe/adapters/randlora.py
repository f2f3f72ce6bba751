"""`adapter: {method: randlora}`: settings of RandLoRA (Albert et al. 2025)."""

from pydantic import Field

from tunekit.recipe.bases import fields
from tunekit.recipe.bases.section import Count, CountOrZero, Fraction, NotNegative, TargetedSettings


class RandloraSettings(TargetedSettings):
    """A sum of frozen random low-rank matrices, each scaled by trained diagonals. The sum has full rank. The defaults
    are from PEFT's RandLoraConfig, as in PEFT's MetaMathQA comparison."""

    summary = "trained scales of many frozen random updates"

    r: Count = Field(32, description="rank of each random matrix; a lower rank means more trained numbers")
    alpha: NotNegative = Field(640.0, description="the update is scaled by alpha / r")
    dropout: Fraction = fields.DROPOUT
    sparse: bool = Field(False, description="random matrices of -1, 0 and 1; two thirds of the numbers are 0")
    very_sparse: bool = Field(
        False,
        description="random matrices of -1, 0 and 1; only one in sqrt(D) numbers is not 0. D: the layer's smaller side",
    )
    projection_prng_key: CountOrZero = Field(0, description="seed of the frozen random matrices, drawn as in PEFT")
    save_projection: bool = Field(True, description="whether the adapter's file contains the frozen matrices")
