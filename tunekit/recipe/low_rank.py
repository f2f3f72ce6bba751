"""Settings that the methods of the LoRA family share; a method's own file in recipe/adapters/ adds what is its own."""

from __future__ import annotations

from pydantic import Field

from tunekit.recipe.section import AdapterSettings, Count, Fraction, NotNegative, Text, TextOrTexts


class LowRankSettings(AdapterSettings):
    """Low-rank update. `target_modules`: all-linear, a list of names or name endings, or one regular expression."""

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
