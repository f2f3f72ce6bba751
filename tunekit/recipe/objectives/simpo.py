"""`objective: simpo` simple preference optimization: mean log-probabilities of the answers, a margin apart."""

from typing import Annotated

from pydantic import Field

from tunekit.recipe.bases.pair_settings import PairSettings
from tunekit.recipe.bases.section import NotNegative, Number, Positive


class SimpoSettings(PairSettings):
    """TRL's names; its defaults but for cpo_alpha, which is the paper's 0 and not the 1 of its CPO trainer."""

    summary = "mean log-probabilities of the answers, a margin apart"

    beta: Positive = Field(0.1, description="scale of the mean log-probabilities; the paper: 2 to 10")
    simpo_gamma: NotNegative = Field(0.5, description="by how much beta times the chosen mean is to be above the other")
    label_smoothing: Annotated[Number, Field(ge=0, lt=0.5)] = Field(0.0, description="share of flipped pairs")
    cpo_alpha: NotNegative = Field(0.0, description="weight of the mean loss of the chosen answers' tokens")
