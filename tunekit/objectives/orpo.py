"""`objective: orpo`: supervised tuning on chosen answers, with the odds of the rejected ones in the same loss."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from tunekit.contracts import EncodeOptions, Facts, Objective, Tokenizer
from tunekit.objectives.losses.pairs import PairLoss
from tunekit.objectives.losses.preferences import odds_ratio
from tunekit.objectives.rows.answers import pair_rows
from tunekit.objectives.rows.text import text_answering
from tunekit.recipe.objectives.orpo import OrpoSettings


def make(settings: OrpoSettings, tokenizer: Tokenizer, facts: Facts, options: EncodeOptions) -> Objective:
    """Pairs whose chosen prompts are predicted too, as in trl, and their odds."""
    formula = partial(odds_ratio, settings=settings)
    loss = PairLoss(formula, settings.beta, averages=True, likelihood=1.0, prompts=True)
    rows = replace(pair_rows(settings, tokenizer, options), prompts=True)
    return Objective(settings.method, settings.family, rows, loss, text_answering(tokenizer))
