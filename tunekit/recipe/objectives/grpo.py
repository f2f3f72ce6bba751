"""`objective: grpo`: group relative policy optimization. The model generates several completions of each prompt, and
learns from the completions with a higher reward than the others."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from tunekit.recipe.bases.sample_settings import SampleSettings

GrpoLossType = Literal["grpo", "dapo", "dr_grpo", "cispo"]
BNPO = (
    "bnpo divides by the tokens of each micro-batch, so the result would depend on the size of micro-batches; write "
    "dapo, which divides by the tokens of the whole step"
)


def _not_by_micro_batch(value: object) -> object:
    if value == "bnpo":
        raise ValueError(BNPO)
    return value


class GrpoSettings(SampleSettings):
    """Settings of GRPO. The names and defaults are TRL's. All completions of a step are one batch, independent of
    micro-batches."""

    summary = "samples of the model, each compared with the other samples for its prompt"

    loss_type: Annotated[GrpoLossType, BeforeValidator(_not_by_micro_batch)] = Field(
        "dapo",
        description="the normalisation of the loss. grpo: mean over tokens, then over completions; dapo: mean over all "
        "tokens of the step; dr_grpo: sum over tokens, divided by max_completion_length; cispo: mean as with dapo, but "
        "the probability ratio is capped and gets no gradient",
    )
    importance_sampling_level: Literal["token", "sequence"] = Field(
        "token",
        description="token: one probability ratio for each token; sequence: one for each completion (GSPO)",
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group",
        description="divide advantages by the standard deviation of the group, of the whole step (batch), or not "
        "at all (none)",
    )
    use_bias_correction_kl: bool = Field(
        True,
        description="with beta above 0: multiply the KL estimate (k3) by the probability ratio, so that the gradient "
        "of the KL is unbiased",
    )

    @model_validator(mode="after")
    def _consistent(self) -> GrpoSettings:
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise ValueError("cispo needs epsilon_high, the maximum of the probability ratio, such as 5.0")
        return self
