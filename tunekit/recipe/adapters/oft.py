"""`adapter: {method: oft}`: settings of OFT, orthogonal fine-tuning (Qiu et al. 2023; OFTv2, Qiu et al. 2025)."""

from __future__ import annotations

from pydantic import Field, model_validator

from tunekit.recipe.bases import fields
from tunekit.recipe.bases.section import AdapterSettings, Count, CountOrZero, Several, Text, TextOrTexts


class BlockSettings(AdapterSettings):
    """Rotates blocks of inputs. A recipe sets either the size or the number of blocks; the other setting is 0."""

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
            raise ValueError("must have either block_size or blocks; set exactly one of them")
        return self


class OftSettings(BlockSettings):
    """Rotates each layer's inputs block by block. A recipe sets either block_size or blocks; the other is 0."""

    summary = "a block-diagonal rotation of each layer's inputs"

    block_size: CountOrZero = Field(
        32,
        description="number of inputs rotated together; if it does not divide a layer's inputs, the nearest divisor is "
        "used",
    )
    block_share: bool = Field(False, description="all blocks of a layer share one rotation")
    use_cayley_neumann: bool = Field(
        True, description="a power series instead of the exact Cayley transform: faster, but only nearly orthogonal"
    )
    num_cayley_neumann_terms: Count = Field(5, le=100, description="number of terms of the power series")
