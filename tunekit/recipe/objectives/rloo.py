"""`objective: rloo`: REINFORCE leave-one-out. The advantage of a completion is its reward minus the mean reward of the
other completions of its prompt."""

from typing import Annotated

from pydantic import AfterValidator, Field

from tunekit.recipe.bases.sample_settings import SampleSettings, several
from tunekit.recipe.bases.section import NotNegative, Whole


class RlooSettings(SampleSettings):
    """Settings of RLOO. The names and defaults are TRL's."""

    summary = "samples of the model, each compared with the mean of the other samples"

    num_generations: Annotated[Whole, Field(le=10**6), AfterValidator(several)] = Field(
        2, description="number of completions of each prompt (its group)"
    )
    beta: NotNegative = Field(
        0.05,
        description="weight of the KL divergence from the model at step 0, which is subtracted from the reward; 0 "
        "needs no reference model",
    )
    normalize_advantages: bool = Field(
        False, description="normalise advantages to mean 0 and standard deviation 1 over the step"
    )
