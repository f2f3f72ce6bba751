"""`adapter: {method: adalora}`: settings of AdaLoRA (Zhang et al. 2023)."""

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

    The mean rank of a layer falls from `init_r` to `target_r` between step `tinit` and the last `tfinal` steps. Its
    distance from `target_r` falls with the cube of the number of remaining steps. Steps are optimizer steps, counted
    from 0.
    """

    summary = "lora that moves its ranks to the layers that need them"

    layers_to_transform: Layers = fields.LAYERS_TO_TRANSFORM
    layers_pattern: TextOrTexts | None = fields.LAYERS_PATTERN
    init_r: Count = Field(12, description="rank of every layer at the start")
    target_r: Count = Field(8, description="mean rank of the layers at the end")
    alpha: Positive = Field(32.0, description="the update is scaled by alpha / init_r")
    dropout: Fraction = fields.DROPOUT
    tinit: CountOrZero = Field(0, description="number of steps before the first rank is removed")
    tfinal: CountOrZero = Field(0, description="number of steps at the end of the run in which no rank is removed")
    deltaT: Count = Field(1, description="number of steps between two changes of ranks")
    beta1: PositiveFraction = Field(0.85, description="decay of the moving average of the importances")
    beta2: PositiveFraction = Field(0.85, description="decay of the moving average of the importances' uncertainty")
    orth_reg_weight: NotNegative = Field(0.5, description="weight of the penalty that keeps the factors orthogonal")
    kept: dict[Text, Several[bool]] = Field(
        default_factory=dict,
        description="only for a loaded adapter: a list for each `module.lora_E`, true for each rank that it still has, "
        "false for each removed rank",
    )
