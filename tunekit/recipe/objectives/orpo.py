"""`objective: orpo`: odds ratio preference optimization, which is supervised tuning on chosen answers with a penalty on
rejected answers."""

from pydantic import Field

from tunekit.recipe.bases.pair_settings import PairSettings
from tunekit.recipe.bases.section import Positive


class OrpoSettings(PairSettings):
    """Settings of ORPO. The names and defaults are TRL's."""

    summary = "supervised tuning on chosen answers, plus a loss on the odds ratio of both answers"

    beta: Positive = Field(0.1, description="weight of the odds ratio loss, the paper's lambda")
