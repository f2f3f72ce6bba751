"""`adapter: {method: delora}` settings of DeLoRA, decoupled low-rank adaptation (Bini et al. 2025)."""

from pydantic import Field

from tunekit.recipe.bases import fields
from tunekit.recipe.bases.section import Count, Expression, Fraction, NotNegative, TargetedSettings, metamath_rate


class DeloraSettings(TargetedSettings):
    """A low-rank update of normalised factors, whose strength is one trained number per layer."""

    summary = "a low-rank update of unit factors and trained strength"
    default_learning_rate = metamath_rate(1e-3, "delora/llama-3.2-3B-rank32")

    r: Count = Field(8, description="rank")
    delora_lambda: NotNegative = Field(15.0, description="the strength at the start; it bounds the update's norm")
    dropout: Fraction = fields.DROPOUT
    rank_pattern: dict[Expression, Count] = fields.RANK_PATTERN
