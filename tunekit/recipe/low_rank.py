"""Settings that the methods of the LoRA family share; a method's own file in recipe/adapters/ adds what is its own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from tunekit.recipe.section import (
    AdapterSettings,
    Count,
    CountOrZero,
    Fraction,
    NotNegative,
    Several,
    Text,
    TextOrTexts,
)


def _one_or_several(value: Any) -> Any:
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


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
    start: Literal["default", "gaussian", "orthogonal"] = Field(
        "default", description="initial A and B of linear layers: a uniform A, a normal A, or two that cancel out"
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="which of the base's biases are trained as well: all, or those of adapted layers"
    )
    modules_to_save: Several[Text] = Field(
        (), description="modules trained whole, such as a head: names or name endings"
    )
    layers_to_transform: Annotated[Several[CountOrZero], BeforeValidator(_one_or_several)] = Field(
        (), description="numbers of the layers adapted; none: all"
    )
    layers_pattern: TextOrTexts | None = Field(
        None, description="name of the list that holds the layers, where a module's name has several numbers"
    )

    @model_validator(mode="after")
    def _pattern_needs_layers(self) -> LowRankSettings:
        if self.layers_pattern is not None and not self.layers_to_transform:
            raise ValueError("layers_pattern says nothing without layers_to_transform")
        return self
