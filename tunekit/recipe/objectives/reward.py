"""`objective: reward`: reward model. A head, trained with the adapter, gives chosen answers a higher score than
rejected answers."""

from pydantic import Field

from tunekit.recipe.bases.pair_settings import REWARDS, PairSettings
from tunekit.recipe.bases.section import Positive, PublishedRate

SCORES = REWARDS[:4]  # metrics that need only the two scores


class RewardSettings(PairSettings):
    """Settings of reward models. The names and defaults are TRL's."""

    summary = "gives each answer a score, higher for chosen answers"
    family = "classifier"
    sums = ("loss", "units", *SCORES)
    answers = False
    has_head = True
    single_score = True
    supervised = True
    default_learning_rate = PublishedRate(1e-4, "huggingface/trl 1.16, the default of its RewardConfig")

    center_rewards_coefficient: Positive | None = Field(
        None, description="weight of the penalty (sum of both scores)^2, which keeps scores near 0; usually 0.01"
    )
