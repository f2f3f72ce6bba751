"""`adapter: {method: lora}` settings of LoRA and rsLoRA (Hu et al. 2021; Kalajdzievski 2023)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunekit.recipe.section import AdapterSettings, Count, Fraction, NotNegative, Text, TextOrTexts


class LoraSettings(AdapterSettings):
    """Low-rank update. `target_modules`: all-linear, a list of names or name endings, or one regular expression."""

    method: Literal["lora"] = Field("lora", description="a low-rank update of each targeted matrix")
    r: Count = Field(16, description="rank")
    alpha: NotNegative = Field(32.0, description="the update is scaled by alpha / r")
    dropout: Fraction = Field(0.0, description="on the update's input, while training")
    target_modules: TextOrTexts = Field(
        "all-linear", description="all-linear, a list of names, or a regular expression"
    )
    exclude_modules: TextOrTexts | None = Field(None, description="modules never adapted, written the same way")
    rank_pattern: dict[Text, Count] = Field(default_factory=dict, description="module pattern: its own r")
    alpha_pattern: dict[Text, NotNegative] = Field(default_factory=dict, description="module pattern: its own alpha")
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(r) instead")
    start: Literal["default"] = Field("default", description="initial A and B")
