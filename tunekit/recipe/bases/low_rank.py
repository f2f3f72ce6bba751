"""Settings shared by the methods of the LoRA family. A method's file in recipe/adapters/ adds its further settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from tunekit.recipe.bases import fields
from tunekit.recipe.bases.section import (
    LARGEST_COUNT,
    AdapterSettings,
    Count,
    Expression,
    Fraction,
    Layers,
    NotNegative,
    Several,
    Text,
    TextOrTexts,
    text_or_texts,
)
from tunekit.recipe.bases.start_choice import DEFAULT_START, StartChoice


def _names_or_nothing(value: object) -> str | tuple[str, ...]:
    """Converts target_modules to a text or a tuple. An empty list is allowed, because target_parameters can be the only
    targets."""
    return () if value is None or value == [] or value == () else text_or_texts(value)


def _token_ids(value: object) -> object:
    """Checks trainable_token_indices: a list of different token ids, or a mapping of module names to such lists."""
    if isinstance(value, dict) and all(isinstance(name, str) and name for name in value):
        return {name: _listed_ids(ids) for name, ids in value.items()}
    return _listed_ids(value)


def _listed_ids(value: object) -> tuple[int, ...]:
    ids = tuple(value) if isinstance(value, list | tuple) else None
    if ids is None or not all(type(each) is int and 0 <= each <= LARGEST_COUNT for each in ids):
        raise ValueError("must be a list of token ids, or a mapping of modules to such lists")
    if len(set(ids)) < len(ids):
        twice = next(each for each in ids if ids.count(each) > 1)
        raise ValueError(f"names the token {twice} twice")
    return ids


class LowRankSettings(AdapterSettings):
    """Low-rank update. `target_modules`: all-linear, a list of names or name endings, or one regular expression."""

    modules_to_save: Several[Text] = fields.MODULES_TO_SAVE
    target_modules: Annotated[str | tuple[str, ...], BeforeValidator(_names_or_nothing)] = fields.TARGET_MODULES
    exclude_modules: TextOrTexts | None = fields.EXCLUDE_MODULES
    layers_to_transform: Layers = fields.LAYERS_TO_TRANSFORM
    layers_pattern: TextOrTexts | None = fields.LAYERS_PATTERN
    r: Count = Field(16, description="rank")
    alpha: NotNegative = Field(32.0, description="the update is scaled by alpha / r")
    dropout: Fraction = fields.DROPOUT
    target_parameters: Several[Text] = Field(
        (),
        description="fused expert weights to adapt, such as experts.down_proj; target_modules: [] adapts no other "
        "weights",
    )
    rank_pattern: dict[Expression, Count] = fields.RANK_PATTERN
    alpha_pattern: dict[Expression, NotNegative] = fields.ALPHA_PATTERN
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(r) (rsLoRA)")
    start: StartChoice = Field(
        DEFAULT_START, description="the initialisation of the LoRA matrices A and B in linear layers"
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="also train biases of the base: all biases, or the biases of layers with an adapter"
    )
    trainable_token_indices: Annotated[tuple[int, ...] | dict[str, tuple[int, ...]], BeforeValidator(_token_ids)] = (
        Field((), description="also train the embeddings of these token ids: a list, or a mapping {MODULE: list}")
    )

    @model_validator(mode="after")
    def _what_goes_together(self) -> LowRankSettings:
        if not self.target_modules and not self.target_parameters:
            raise ValueError(
                "target_modules names no layer, and target_parameters is empty too; name a target in one of them"
            )
        if self.layers_pattern is not None and not self.layers_to_transform:
            raise ValueError(
                "layers_pattern has no effect without layers_to_transform; add it, or remove layers_pattern"
            )
        if self.init_from is not None and self.start.method != "default":
            what = f"start cannot be {self.start.method} if init_from names an adapter to continue"
            raise ValueError(f"{what}; remove start or init_from")
        return self
