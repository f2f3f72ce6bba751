"""`adapter: {method: lokr}`: settings of LoKr, the low-rank Kronecker product (Yeh et al. 2024; LyCORIS)."""

from typing import Annotated

from pydantic import Field

from tunekit.recipe.bases import fields
from tunekit.recipe.bases.section import LARGEST_COUNT, Count, Expression, NotNegative, TargetedSettings, Whole


class LokrSettings(TargetedSettings):
    """The update is the Kronecker product of a smaller and a larger matrix. Each of the two can be a full matrix or a
    product of two low-rank factors."""

    summary = "a Kronecker product of two small matrices"

    r: Count = Field(
        8,
        description="rank of the larger matrix; a rank of half its longer side or more leaves the matrix unfactorised",
    )
    alpha: NotNegative = Field(8.0, description="the update is scaled by alpha / r")
    decompose_both: bool = Field(False, description="also factorise the smaller matrix into low-rank factors")
    decompose_factor: Annotated[Whole, Field(ge=-1, le=LARGEST_COUNT)] = Field(
        -1, description="maximum side of the smaller matrix; -1: its sides are the divisors nearest to the square root"
    )
    rank_pattern: dict[Expression, Count] = fields.RANK_PATTERN
    alpha_pattern: dict[Expression, NotNegative] = fields.ALPHA_PATTERN
