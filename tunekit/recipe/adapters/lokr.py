"""`adapter: {method: lokr}` settings of LoKr, the low-rank Kronecker product (Yeh et al. 2024; LyCORIS)."""

from typing import Annotated

from pydantic import Field

from tunekit.recipe.bases import fields
from tunekit.recipe.bases.section import LARGEST_COUNT, Count, Expression, NotNegative, TargetedSettings, Whole


class LokrSettings(TargetedSettings):
    """The update is a Kronecker product of a small matrix and a larger one, each of them low-rank where r is small."""

    summary = "a Kronecker product of two small matrices"

    r: Count = Field(8, description="rank of the larger matrix; from half of its larger side on, it is kept whole")
    alpha: NotNegative = Field(8.0, description="the update is scaled by alpha / r")
    decompose_both: bool = Field(False, description="the smaller matrix is low-rank as well")
    decompose_factor: Annotated[Whole, Field(ge=-1, le=LARGEST_COUNT)] = Field(
        -1, description="larger bound of the smaller matrix's sides; -1: the divisor next to the square root"
    )
    rank_pattern: dict[Expression, Count] = fields.RANK_PATTERN
    alpha_pattern: dict[Expression, NotNegative] = fields.ALPHA_PATTERN
