"""`adapter: {method: boft}`: settings of BOFT, orthogonal fine-tuning by butterflies (Liu et al. 2024)."""

from pydantic import Field

from tunekit.recipe.adapters.oft import BlockSettings
from tunekit.recipe.bases.section import Count, CountOrZero


class BoftSettings(BlockSettings):
    """Rotates each layer's inputs block by block, and scales each output. A recipe sets `block_size` or `blocks`; the
    other is 0."""

    summary = "a product of block rotations of each layer's inputs"

    block_size: CountOrZero = Field(
        4, description="number of inputs rotated together; it must divide the number of inputs of every layer"
    )
    butterfly_factors: Count = Field(
        1,
        le=32,
        description="number of rotations in the product; each further rotation doubles the number of inputs that are "
        "mixed (PEFT needs CUDA for more than 1)",
    )
