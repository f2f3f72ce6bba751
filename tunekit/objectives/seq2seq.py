"""`objective: seq2seq`: cross entropy on the answers of encoder-decoders (T5, BART)."""

from tunekit.contracts import EncodeOptions, Facts, Objective, Tokenizer
from tunekit.objectives.base import row_fingerprint
from tunekit.objectives.losses.tokens import TokenLoss, own_positions
from tunekit.objectives.rows.sources import SourceRows
from tunekit.objectives.rows.text import text_answering
from tunekit.recipe.objectives.seq2seq import Seq2seqSettings


def make(settings: Seq2seqSettings, tokenizer: Tokenizer, facts: Facts, options: EncodeOptions) -> Objective:
    """Make the objective. Rows are sources with answers; the loss is cross entropy on the answers."""
    rows = SourceRows(tokenizer, row_fingerprint(settings, tokenizer), options)
    return Objective(settings.method, settings.family, rows, TokenLoss(own_positions), text_answering(tokenizer))
