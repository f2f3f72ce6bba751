"""`adapter: {method: delora}`: settings of DeLoRA, decoupled low-rank adaptation (Bini et al. 2025)."""

from pydantic import Field

from tunekit.recipe.bases import fields
from tunekit.recipe.bases.section import Count, Expression, Fraction, NotNegative, TargetedSettings, metamath_rate


class DeloraSettings(TargetedSettings):
    """A low-rank update with normalised factors and one trained strength per layer."""

    summary = "a low-rank update with unit factors and a trained strength"
    default_learning_rate = metamath_rate(1e-3, "delora/llama-3.2-3B-rank32")

    r: Count = Field(8, description="rank")
    delora_lambda: NotNegative = Field(
        15.0, description="the initial strength, which is the maximum norm of the update"
    )
    dropout: Fraction = fields.DROPOUT
    rank_pattern: dict[Expression, Count] = fields.RANK_PATTERN
