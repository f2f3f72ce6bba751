"""`adapter: {method: lokr}` settings of LoKr, the low-rank Kronecker product (Yeh et al. 2024; LyCORIS)."""

from typing import Annotated

from pydantic import Field

from tunekit.recipe.bases import fields
from tunekit.recipe.bases.section import LARGEST_COUNT, Count, Expression, NotNegative, TargetedSettings, Whole


class LokrSettings(TargetedSettings):
    """The update is the Kronecker product of a smaller and a larger matrix, which may be low-rank themselves."""

    summary = "a Kronecker product of two small matrices"

    r: Count = Field(
        8,
        description="rank of the larger matrix; if it is half of the longer side or more, the matrix is not factorised",
    )
    alpha: NotNegative = Field(8.0, description="the update is scaled by alpha / r")
    decompose_both: bool = Field(False, description="make the smaller matrix low-rank too")
    decompose_factor: Annotated[Whole, Field(ge=-1, le=LARGEST_COUNT)] = Field(
        -1, description="maximum of the smaller matrix's sides; -1: the divisor nearest to the square root"
    )
    rank_pattern: dict[Expression, Count] = fields.RANK_PATTERN
    alpha_pattern: dict[Expression, NotNegative] = fields.ALPHA_PATTERN
