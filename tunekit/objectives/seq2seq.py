"""`objective: seq2seq`: cross entropy on the answers of encoder-decoders (T5, BART)."""

from __future__ import annotations

from tunekit.contracts import EncodeOptions, Facts, Objective, Tokenizer
from tunekit.files.cache_folder import hash_of
from tunekit.objectives.losses.tokens import TokenLoss, own_positions
from tunekit.objectives.rows.sources import SourceRows
from tunekit.objectives.rows.text import text_answering
from tunekit.recipe.objectives.seq2seq import Seq2seqSettings


def make(settings: Seq2seqSettings, tokenizer: Tokenizer, facts: Facts, options: EncodeOptions) -> Objective:
    """Sources with answers, and cross entropy."""
    fingerprint = hash_of([settings.model_dump(mode="json"), tokenizer.fingerprint])
    rows = SourceRows(tokenizer, fingerprint, options)
    return Objective(settings.method, settings.family, rows, TokenLoss(own_positions), text_answering(tokenizer))
