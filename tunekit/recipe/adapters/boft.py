"""`adapter: {method: boft}` settings of BOFT, orthogonal fine-tuning by butterflies (Liu et al. 2024)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tunekit.recipe.bases.rotated_blocks import BLOCKS, check_one_is_given, void_the_other
from tunekit.recipe.bases.section import Count, CountOrZero, TargetedSettings


class BoftSettings(TargetedSettings):
    """A product of block rotations of each layer's inputs, and a scale of each output. One of the first two is 0."""

    method: Literal["boft"] = Field("boft", description="a product of block rotations of each layer's inputs")
    block_size: CountOrZero = Field(4, description="inputs rotated together; it divides every layer's inputs")
    blocks: CountOrZero = BLOCKS
    butterfly_factors: Count = Field(
        1, le=32, description="rotations in the product; each doubles the reach of a block (peft needs CUDA beyond 1)"
    )

    _voids = model_validator(mode="before")(void_the_other)
    _one_is_given = model_validator(mode="after")(check_one_is_given)
