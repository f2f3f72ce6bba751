"""`objective: orpo`: supervised tuning on chosen answers. The loss also includes the odds ratio of the chosen and the
rejected answer."""

from functools import partial

from tunekit.contracts import EncodeOptions, Facts, Objective, Tokenizer
from tunekit.objectives.losses.pairs import PairLoss
from tunekit.objectives.losses.preferences import odds_ratio
from tunekit.objectives.rows.answers import pair_objective
from tunekit.recipe.objectives.orpo import OrpoSettings


def make(settings: OrpoSettings, tokenizer: Tokenizer, facts: Facts, options: EncodeOptions) -> Objective:
    """Make the objective. Rows are pairs of answers; the loss includes their odds ratio. As in trl, the prompts of
    chosen answers are also trained on."""
    formula = partial(odds_ratio, settings=settings)
    loss = PairLoss(formula, settings.beta, averages=True, likelihood=1.0, prompts=True)
    return pair_objective(settings, tokenizer, options, loss, prompts=True)
