"""`adapter: {method: loha}` settings of LoHa, the low-rank Hadamard product (Hyeon-Woo et al. 2022; LyCORIS)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunekit.recipe.section import Count, LayerSettings, NotNegative, Text, TextOrTexts


class LohaSettings(LayerSettings):
    """The update is the elementwise product of two low-rank matrices: its rank reaches r * r."""

    method: Literal["loha"] = Field("loha", description="an elementwise product of two low-rank updates")
    r: Count = Field(8, description="rank of each of the two factors")
    alpha: NotNegative = Field(8.0, description="the update is scaled by alpha / r")
    target_modules: TextOrTexts = Field(
        "all-linear", description="all-linear, a list of names, or a regular expression"
    )
    exclude_modules: TextOrTexts | None = Field(None, description="modules never adapted, written the same way")
    rank_pattern: dict[Text, Count] = Field(default_factory=dict, description="module pattern: its own r")
    alpha_pattern: dict[Text, NotNegative] = Field(default_factory=dict, description="module pattern: its own alpha")
