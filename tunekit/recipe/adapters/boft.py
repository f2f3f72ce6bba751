"""`adapter: {method: boft}` settings of BOFT, orthogonal fine-tuning by butterflies (Liu et al. 2024)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from tunekit.recipe.section import Count, CountOrZero, LayerSettings, TextOrTexts


class BoftSettings(LayerSettings):
    """A product of block rotations of each layer's inputs, and a scale of each output. One of the first two is 0."""

    method: Literal["boft"] = Field("boft", description="a product of block rotations of each layer's inputs")
    block_size: CountOrZero = Field(4, description="inputs rotated together; it divides every layer's inputs")
    blocks: CountOrZero = Field(0, description="number of blocks, instead of block_size")
    butterfly_factors: Count = Field(
        1, le=32, description="rotations in the product; each doubles the reach of a block (peft needs CUDA beyond 1)"
    )
    target_modules: TextOrTexts = Field(
        "all-linear", description="all-linear, a list of names, or a regular expression"
    )
    exclude_modules: TextOrTexts | None = Field(None, description="modules never adapted, written the same way")

    @model_validator(mode="before")
    @classmethod
    def _one_voids_the_other(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("blocks") and "block_size" not in values:
            return {**values, "block_size": 0}
        return values

    @model_validator(mode="after")
    def _exactly_one(self) -> BoftSettings:
        if bool(self.block_size) == bool(self.blocks):
            raise ValueError("give block_size or blocks, not both and not neither")
        return self
