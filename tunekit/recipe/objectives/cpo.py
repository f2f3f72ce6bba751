"""`objective: cpo`: contrastive preference optimization on chosen and rejected answers, without a reference model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tunekit.recipe.bases.pair_settings import PairSettings
from tunekit.recipe.bases.section import NotNegative, Number, Positive


class CpoSettings(PairSettings):
    """Settings of CPO. The names and defaults are TRL's."""

    summary = "prefers chosen over rejected answers, without a reference model"

    beta: Positive = Field(
        0.1, description="scale of the difference between both answers' log-probabilities; for ipo, the paper's tau"
    )
    loss_type: Literal["sigmoid", "hinge", "ipo"] = Field(
        "sigmoid", description="the loss as a function of both answers' log-probabilities"
    )
    label_smoothing: Annotated[Number, Field(ge=0, lt=0.5)] = Field(
        0.0, description="for sigmoid: the assumed share of pairs whose two answers are swapped"
    )
    cpo_alpha: NotNegative = Field(1.0, description="weight of the mean loss on the chosen answers' tokens")

    @model_validator(mode="after")
    def _smoothing_is_read(self) -> CpoSettings:
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError("label_smoothing has an effect only with loss_type sigmoid; remove it")
        return self
