"""`adapter: {method: hra}` settings of HRA, Householder reflection adaptation (Yuan et al. 2024)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunekit.recipe.section import Count, LayerSettings, TextOrTexts


class HraSettings(LayerSettings):
    """A chain of r reflections of each layer's inputs."""

    method: Literal["hra"] = Field("hra", description="a chain of reflections of each layer's inputs")
    r: Count = Field(8, description="reflections; an even number starts as the base, to rounding")
    orthogonal: bool = Field(False, description="make the reflections' vectors orthogonal (Gram-Schmidt)")
    target_modules: TextOrTexts = Field(
        "all-linear", description="all-linear, a list of names, or a regular expression"
    )
    exclude_modules: TextOrTexts | None = Field(None, description="modules never adapted, written the same way")
