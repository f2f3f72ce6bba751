"""`objective: cpo`: preference tuning that compares the policy's scores of two answers, without a reference model."""

from functools import partial

from tunekit.contracts import EncodeOptions, Facts, Objective, Tokenizer
from tunekit.objectives.losses.pairs import PairLoss
from tunekit.objectives.losses.preferences import contrastive
from tunekit.objectives.rows.answers import pair_objective
from tunekit.recipe.objectives.cpo import CpoSettings


def make(settings: CpoSettings, tokenizer: Tokenizer, facts: Facts, options: EncodeOptions) -> Objective:
    """Make the objective. Rows are pairs of answers; the loss depends on the difference of the answers' scores."""
    formula, averages = partial(contrastive, settings=settings), settings.loss_type == "ipo"
    loss = PairLoss(formula, settings.beta, averages=averages, likelihood=settings.cpo_alpha)
    return pair_objective(settings, tokenizer, options, loss)
