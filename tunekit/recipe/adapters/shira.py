"""`adapter: {method: shira}` settings of SHiRA, the sparse high-rank adapter (Bhardwaj et al. 2024)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunekit.recipe.section import AdapterSettings, Count, TextOrTexts


class ShiraSettings(AdapterSettings):
    """A few single numbers of each matrix, drawn at random by the run's seed, are trained."""

    method: Literal["shira"] = Field("shira", description="single numbers of each matrix, drawn at random")
    r: Count = Field(32, description="r * (inputs + outputs) numbers are trained, as many as LoRA of rank r has")
    target_modules: TextOrTexts = Field(
        "all-linear", description="all-linear, a list of names, or a regular expression"
    )
    exclude_modules: TextOrTexts | None = Field(None, description="modules never adapted, written the same way")
