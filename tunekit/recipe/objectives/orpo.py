"""`objective: orpo` odds ratio preference optimization: supervised tuning on chosen answers, and a penalty on rejected
ones."""

from pydantic import Field

from tunekit.recipe.bases.pair_settings import PairSettings
from tunekit.recipe.bases.section import Positive


class OrpoSettings(PairSettings):
    """TRL's names and defaults."""

    summary = "supervised tuning on chosen answers, plus an odds ratio of both"

    beta: Positive = Field(0.1, description="weight of the odds ratio, the paper's lambda")
