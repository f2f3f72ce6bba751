"""`adapter: {method: boft}` settings of BOFT, orthogonal fine-tuning by butterflies (Liu et al. 2024)."""

from pydantic import Field

from tunekit.recipe.adapters.oft import BlockSettings
from tunekit.recipe.bases.section import Count, CountOrZero


class BoftSettings(BlockSettings):
    """A product of block rotations of each layer's inputs, and a scale of each output. One of the first two is 0."""

    summary = "a product of block rotations of each layer's inputs"

    block_size: CountOrZero = Field(4, description="inputs rotated together; it divides every layer's inputs")
    butterfly_factors: Count = Field(
        1, le=32, description="rotations in the product; each doubles the reach of a block (peft needs CUDA beyond 1)"
    )
