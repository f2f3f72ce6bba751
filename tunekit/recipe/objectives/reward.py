"""`objective: reward` reward model: a head of one score is trained with the adapter, higher for preferred answers."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from tunekit.recipe.bases.pair_settings import REWARDS, PairSettings
from tunekit.recipe.bases.section import Positive, PublishedRate

SCORES = REWARDS[:4]  # what is logged of two scores alone


class RewardSettings(PairSettings):
    """TRL's names and defaults."""

    family: ClassVar[str] = "classifier"
    sums: ClassVar[tuple[str, ...]] = ("loss", "units", *SCORES)
    answers: ClassVar[bool] = False
    has_head: ClassVar[bool] = True
    single_score: ClassVar[bool] = True
    default_learning_rate: ClassVar[PublishedRate | None] = PublishedRate(
        1e-4, "huggingface/trl 1.16, the default of its RewardConfig"
    )

    method: Literal["reward"] = Field("reward", description="a score for each answer, higher for preferred ones")
    center_rewards_coefficient: Positive | None = Field(
        None, description="weight of the squared sum of both scores, which draws scores to 0; 0.01 is usual"
    )
