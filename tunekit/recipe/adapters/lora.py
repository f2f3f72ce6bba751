"""`adapter: {method: lora}` settings of LoRA and rsLoRA (Hu et al. 2021; Kalajdzievski 2023)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunekit.recipe.section import Count, Fraction, NotNegative, Section


class LoraSettings(Section):
    """Low-rank update. `target_modules`: all-linear, a list of names or name endings, or one regular expression."""

    method: Literal["lora"] = "lora"
    r: Count = 16
    alpha: NotNegative = 32.0
    dropout: Fraction = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] | None = None
    rank_pattern: dict[str, Count] = Field(default_factory=dict)
    alpha_pattern: dict[str, NotNegative] = Field(default_factory=dict)
    use_rslora: bool = False
    start: Literal["default"] = "default"
    init_from: str | None = None
