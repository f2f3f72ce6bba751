"""`objective: kto`: tuning on single answers marked as good or bad. The reference is the model at step 0."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from tunekit.contracts import EncodeOptions, Facts, Objective, Rows, Tokenizer
from tunekit.objectives.base import row_fingerprint
from tunekit.objectives.losses.kto import SIDE, KtoLoss, balance_notes, longest_first
from tunekit.objectives.rows.answers import AnswerRows
from tunekit.objectives.rows.text import text_answering
from tunekit.recipe.objectives.kto import KtoSettings


def make(settings: KtoSettings, tokenizer: Tokenizer, facts: Facts, options: EncodeOptions) -> Objective:
    """Make the objective. Rows are single answers marked as good or bad. The objective's `learning` reads the lengths
    of all rows, and adds a note if the weights do not balance good and bad answers."""
    rows = AnswerRows(
        tokenizer,
        row_fingerprint(settings, tokenizer),
        options,
        example="unpaired",
        sides=(SIDE,),
        further={"label": "?"},
        unusable=settings.unusable_rows,
        unusable_key="unusable_rows",
    )
    objective = Objective(settings.method, settings.family, rows, KtoLoss(settings), text_answering(tokenizer))
    return replace(objective, learning=partial(_learned, settings))


def _learned(settings: KtoSettings, objective: Objective, rows: Sequence[Rows]) -> Objective:
    loss = KtoLoss(settings, lengths=longest_first(rows))
    return replace(objective, loss=loss, notes=balance_notes(settings, rows[0]))
