"""`objective: classify`: sequence classification, one label for each text."""

from tunekit.contracts import EncodeOptions, Facts, Objective, Tokenizer
from tunekit.files.cache_folder import hash_of
from tunekit.objectives.base import row_fingerprint
from tunekit.objectives.losses.labels import LabelLoss
from tunekit.objectives.rows.labelled import LabelledTexts
from tunekit.objectives.rows.labels import given_labels, label_objective
from tunekit.recipe.objectives.classify import ClassifySettings


def make(settings: ClassifySettings, tokenizer: Tokenizer, facts: Facts, options: EncodeOptions) -> Objective:
    """Texts with labels, and cross entropy."""
    labels = given_labels(settings, facts, tokenizer.pad_id)
    fingerprint = hash_of([row_fingerprint(settings, tokenizer), repr(tokenizer.pairing)])
    return label_objective(settings, LabelledTexts(settings, tokenizer, fingerprint, options, labels), LabelLoss())
