"""`objective: simpo`: simple preference optimization of the mean log-probabilities of both answers, with a margin."""

from typing import Annotated

from pydantic import Field

from tunekit.recipe.bases.pair_settings import PairSettings
from tunekit.recipe.bases.section import NotNegative, Number, Positive


class SimpoSettings(PairSettings):
    """Settings of SimPO. The names and defaults are TRL's, except cpo_alpha: 0 as in the paper, not 1 as in TRL."""

    summary = "compares the mean log-probabilities of both answers, with a margin"

    beta: Positive = Field(0.1, description="scale of the mean log-probabilities; the paper uses 2 to 10")
    simpo_gamma: NotNegative = Field(
        0.5, description="the margin between both answers' mean log-probabilities, after scaling by beta"
    )
    label_smoothing: Annotated[Number, Field(ge=0, lt=0.5)] = Field(
        0.0, description="the assumed share of pairs whose two answers are swapped"
    )
    cpo_alpha: NotNegative = Field(0.0, description="weight of the mean loss on the chosen answers' tokens")
