"""`adapter: {method: loha}`: settings of LoHa, the low-rank Hadamard product (Hyeon-Woo et al. 2022; LyCORIS)."""

from pydantic import Field

from tunekit.recipe.bases import fields
from tunekit.recipe.bases.section import Count, Expression, NotNegative, TargetedSettings


class LohaSettings(TargetedSettings):
    """The update is the elementwise product of two low-rank matrices, which has a rank of up to r * r."""

    summary = "an elementwise product of two low-rank updates"

    r: Count = Field(8, description="rank of each of the two matrices")
    alpha: NotNegative = Field(8.0, description="the update is scaled by alpha / r")
    rank_pattern: dict[Expression, Count] = fields.RANK_PATTERN
    alpha_pattern: dict[Expression, NotNegative] = fields.ALPHA_PATTERN
