"""`objective: dpo`: the policy learns to prefer the better of two answers. The reference is the model at step 0.

Source: Rafailov et al. 2023.
"""

from functools import partial

from tunekit.contracts import EncodeOptions, Facts, Objective, Tokenizer
from tunekit.objectives.losses.pairs import PairLoss
from tunekit.objectives.losses.preferences import shorter_first, weighted_losses
from tunekit.objectives.rows.answers import pair_objective
from tunekit.recipe.objectives.dpo import DpoSettings


def make(settings: DpoSettings, tokenizer: Tokenizer, facts: Facts, options: EncodeOptions) -> Objective:
    """Make the objective. Rows are pairs of answers; the loss is a weighted sum of losses that compare the policy with
    the reference."""
    loss = PairLoss(
        partial(weighted_losses, settings=settings),
        settings.beta,
        likelihood=sum(weight for name, weight in settings.weighted_losses if name == "sft"),
        token_weights=None if settings.ld_alpha is None else partial(shorter_first, alpha=settings.ld_alpha),
        reference=True,
        matches="aot" in settings.loss_type,
        keeps=settings.precompute_ref_log_probs,
    )
    return pair_objective(settings, tokenizer, options, loss)
