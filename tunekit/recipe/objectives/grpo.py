"""`objective: grpo` group relative policy optimization: of several completions of its own to one prompt, the model
learns those whose reward is above the others'."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from tunekit.recipe.bases.sample_settings import SampleSettings

GrpoLossType = Literal["grpo", "dapo", "dr_grpo", "cispo"]
BNPO = (
    "bnpo divides by the tokens of each micro-batch, so that micro-batches would change the result; write dapo, which "
    "divides by those of the whole step"
)


def _not_by_micro_batch(value: object) -> object:
    if value == "bnpo":
        raise ValueError(BNPO)
    return value


class GrpoSettings(SampleSettings):
    """TRL's names and defaults; a step's completions are one batch, whatever its micro-batches."""

    summary = "samples of the model, each against the others to its prompt"

    loss_type: Annotated[GrpoLossType, BeforeValidator(_not_by_micro_batch)] = Field(
        "dapo",
        description="grpo: mean of each completion's mean; dapo: by all tokens of the step; dr_grpo: by "
        "max_completion_length; cispo: the ratio capped at epsilon_high, its gradient left out, by all tokens",
    )
    importance_sampling_level: Literal["token", "sequence"] = Field(
        "token", description="sequence: one ratio for each completion (GSPO)"
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="advantages over the standard deviation of the group, of the step, or as they are"
    )
    use_bias_correction_kl: bool = Field(
        True, description="of beta: the KL (k3) times the ratio, so that its gradient is unbiased"
    )

    @model_validator(mode="after")
    def _consistent(self) -> GrpoSettings:
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise ValueError("epsilon_high is what cispo caps the ratio itself at; write it, 5.0 for one")
        return self
