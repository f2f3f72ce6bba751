"""`adapter: {method: oft}` settings of OFT, orthogonal fine-tuning (Qiu et al. 2023; OFTv2, Qiu et al. 2025)."""

from __future__ import annotations

from pydantic import Field, model_validator

from tunekit.recipe.bases import fields
from tunekit.recipe.bases.section import AdapterSettings, Count, CountOrZero, Several, Text, TextOrTexts


class BlockSettings(AdapterSettings):
    """Rotations of blocks, whose size or number is given; the other one is 0."""

    modules_to_save: Several[Text] = fields.MODULES_TO_SAVE
    target_modules: TextOrTexts = fields.TARGET_MODULES
    exclude_modules: TextOrTexts | None = fields.EXCLUDE_MODULES
    block_size: CountOrZero
    blocks: CountOrZero = Field(0, description="number of blocks, instead of block_size")

    @model_validator(mode="before")
    @classmethod
    def _one_voids_the_other(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("blocks") and "block_size" not in values:
            return {**values, "block_size": 0}
        return values

    @model_validator(mode="after")
    def _exactly_one(self) -> BlockSettings:
        if bool(self.block_size) == bool(self.blocks):
            raise ValueError("give block_size or blocks, not both and not neither")
        return self


class OftSettings(BlockSettings):
    """A rotation of each layer's inputs, block by block. Of block_size and blocks one is given; the other is 0."""

    summary = "a block-diagonal rotation of each layer's inputs"

    block_size: CountOrZero = Field(
        32, description="inputs rotated together; where it does not divide them, the nearest divisor"
    )
    block_share: bool = Field(False, description="one rotation for all blocks of a layer")
    use_cayley_neumann: bool = Field(
        True, description="a power series in place of the exact Cayley transform: faster, orthogonal only nearly"
    )
    num_cayley_neumann_terms: Count = Field(5, le=100, description="terms of that series")
