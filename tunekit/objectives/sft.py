"""`objective: sft`: next-token cross entropy on the supervised tokens of causal models."""

from tunekit.contracts import EncodeOptions, Facts, Objective, Tokenizer
from tunekit.objectives.base import row_fingerprint
from tunekit.objectives.losses.tokens import TokenLoss
from tunekit.objectives.rows.sequences import SequenceRows
from tunekit.objectives.rows.text import text_answering
from tunekit.recipe.objectives.sft import SftSettings


def make(settings: SftSettings, tokenizer: Tokenizer, facts: Facts, options: EncodeOptions) -> Objective:
    """Make the objective. Rows are token sequences; the loss is cross entropy on supervised tokens."""
    rows = SequenceRows(tokenizer, row_fingerprint(settings, tokenizer), options)
    return Objective(settings.method, settings.family, rows, TokenLoss(), text_answering(tokenizer))
