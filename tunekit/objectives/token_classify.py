"""`objective: token_classify`: token classification, one tag for each word."""

from tunekit.contracts import EncodeOptions, Facts, Objective, Tokenizer
from tunekit.objectives.base import row_fingerprint
from tunekit.objectives.losses.labels import TagLoss
from tunekit.objectives.rows.labels import given_labels, label_objective
from tunekit.objectives.rows.tagged import TaggedWords
from tunekit.recipe.objectives.token_classify import TokenClassifySettings


def make(settings: TokenClassifySettings, tokenizer: Tokenizer, facts: Facts, options: EncodeOptions) -> Objective:
    """Make the objective. Rows are words with tags; the loss is cross entropy on the tags."""
    labels, fingerprint = given_labels(settings, facts, tokenizer.pad_id), row_fingerprint(settings, tokenizer)
    return label_objective(settings, TaggedWords(settings, tokenizer, fingerprint, options, labels), TagLoss())
