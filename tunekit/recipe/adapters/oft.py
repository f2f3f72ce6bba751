"""`adapter: {method: oft}` settings of OFT, orthogonal fine-tuning (Qiu et al. 2023; OFTv2, Qiu et al. 2025)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tunekit.recipe.bases.rotated_blocks import BLOCKS, check_one_is_given, void_the_other
from tunekit.recipe.bases.section import Count, CountOrZero, TargetedSettings


class OftSettings(TargetedSettings):
    """A rotation of each layer's inputs, block by block. Of block_size and blocks one is given; the other is 0."""

    method: Literal["oft"] = Field("oft", description="a block-diagonal rotation of each layer's inputs")
    block_size: CountOrZero = Field(
        32, description="inputs rotated together; where it does not divide them, the nearest divisor"
    )
    blocks: CountOrZero = BLOCKS
    block_share: bool = Field(False, description="one rotation for all blocks of a layer")
    use_cayley_neumann: bool = Field(
        True, description="a power series in place of the exact Cayley transform: faster, orthogonal only nearly"
    )
    num_cayley_neumann_terms: Count = Field(5, le=100, description="terms of that series")

    _voids = model_validator(mode="before")(void_the_other)
    _one_is_given = model_validator(mode="after")(check_one_is_given)
