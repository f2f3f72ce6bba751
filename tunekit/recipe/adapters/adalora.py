"""`adapter: {method: adalora}` settings of AdaLoRA (Zhang et al. 2023)."""

from typing import Annotated

from pydantic import Field

from tunekit.recipe.bases import fields
from tunekit.recipe.bases.section import (
    Count,
    CountOrZero,
    Fraction,
    Layers,
    NotNegative,
    Positive,
    Several,
    TargetedSettings,
    Text,
    TextOrTexts,
)

PositiveFraction = Annotated[Fraction, Field(gt=0)]


class AdaloraSettings(TargetedSettings):
    """Low-rank updates in the form of a singular value decomposition, whose ranks move to the layers that need them.

    The ranks of all layers together fall from `init_r` to `target_r` per layer between step `tinit` and the last
    `tfinal` steps, by the third power of the steps left. Steps are optimizer steps, counted from 0.
    """

    summary = "lora whose rank is shared out among the layers"

    layers_to_transform: Layers = fields.LAYERS_TO_TRANSFORM
    layers_pattern: TextOrTexts | None = fields.LAYERS_PATTERN
    init_r: Count = Field(12, description="rank of every layer at the start")
    target_r: Count = Field(8, description="mean rank of the layers at the end")
    alpha: Positive = Field(32.0, description="the update is scaled by alpha / init_r")
    dropout: Fraction = fields.DROPOUT
    tinit: CountOrZero = Field(0, description="steps before the first rank is taken away")
    tfinal: CountOrZero = Field(0, description="last steps, in which the ranks stay as they are")
    deltaT: Count = Field(1, description="steps between two changes of ranks")
    beta1: PositiveFraction = Field(0.85, description="memory of the importances from step to step")
    beta2: PositiveFraction = Field(0.85, description="memory of the importances' uncertainty")
    orth_reg_weight: NotNegative = Field(0.5, description="weight of the penalty that keeps the factors orthogonal")
    kept: dict[Text, Several[bool]] = Field(
        default_factory=dict, description="of an adapter already cut down: module.lora_E: which ranks it still has"
    )
