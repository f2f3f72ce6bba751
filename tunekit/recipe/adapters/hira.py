"""`adapter: {method: hira}`: settings of HiRA, Hadamard high-rank adaptation (Huang et al. 2025)."""

from pydantic import Field

from tunekit.recipe.bases import fields
from tunekit.recipe.bases.section import Count, Fraction, TargetedSettings, metamath_rate


class HiraSettings(TargetedSettings):
    """A low-rank matrix scales the base's matrix element by element."""

    summary = "the base's matrix times a low-rank matrix, element by element"
    default_learning_rate = metamath_rate(4.5e-3, "hira/llama-3.2-3B-rank32-lr4.5e-3")

    r: Count = Field(32, description="rank of the low-rank matrix that scales the base's matrix")
    dropout: Fraction = fields.DROPOUT
