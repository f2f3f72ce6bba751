"""`objective: sft`: next-token cross entropy on the supervised tokens of causal models."""

from __future__ import annotations

from tunekit.contracts import EncodeOptions, Facts, Objective, Tokenizer
from tunekit.files.cache_folder import hash_of
from tunekit.objectives.losses.tokens import TokenLoss
from tunekit.objectives.rows.sequences import SequenceRows
from tunekit.objectives.rows.text import text_answering
from tunekit.recipe.objectives.sft import SftSettings


def make(settings: SftSettings, tokenizer: Tokenizer, facts: Facts, options: EncodeOptions) -> Objective:
    """Sequences and cross entropy."""
    fingerprint = hash_of([settings.model_dump(mode="json"), tokenizer.fingerprint])
    rows = SequenceRows(tokenizer, fingerprint, options)
    return Objective(settings.method, settings.family, rows, TokenLoss(), text_answering(tokenizer))
