"""`objective: simpo`: preference tuning without a reference model. The chosen answer's mean log-probability should be
higher, by a margin, than the rejected answer's mean log-probability."""

from functools import partial

from tunekit.contracts import EncodeOptions, Facts, Objective, Tokenizer
from tunekit.objectives.losses.pairs import PairLoss
from tunekit.objectives.losses.preferences import simple
from tunekit.objectives.rows.answers import pair_objective
from tunekit.recipe.objectives.simpo import SimpoSettings


def make(settings: SimpoSettings, tokenizer: Tokenizer, facts: Facts, options: EncodeOptions) -> Objective:
    """Make the objective. Rows are pairs of answers; the loss reads their mean log-probabilities."""
    formula = partial(simple, settings=settings)
    loss = PairLoss(formula, settings.beta, averages=True, likelihood=settings.cpo_alpha)
    return pair_objective(settings, tokenizer, options, loss)
