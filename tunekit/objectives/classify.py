"""`objective: classify`: sequence classification and regression. Each text has one label, several labels or numbers."""

from tunekit.contracts import EncodeOptions, Facts, Objective, Tokenizer
from tunekit.files.cache_folder import hash_of
from tunekit.objectives.base import row_fingerprint
from tunekit.objectives.losses.problem_types import label_loss
from tunekit.objectives.rows.labelled import LabelledTexts
from tunekit.objectives.rows.labels import given_labels, label_objective, settings_of_head
from tunekit.recipe.objectives.classify import ClassifySettings


def make(settings: ClassifySettings, tokenizer: Tokenizer, facts: Facts, options: EncodeOptions) -> Objective:
    """Make the objective. Rows are texts with labels; the loss depends on the head's problem type."""
    settings = settings_of_head(settings, facts)
    labels = given_labels(settings, facts, tokenizer.pad_id, settings.problem_type)
    pairs = facts.get("pairs")  # only a trained adapter has this fact
    stated = {"pairs": True} if pairs else {}
    decisive = [row_fingerprint(settings, tokenizer), repr(tokenizer.pairing), *stated]
    decisive += ["single"] if pairs is False else []
    rows = LabelledTexts(settings, tokenizer, hash_of(decisive), options, labels, pairs)
    return label_objective(settings, rows, label_loss(settings, facts), None, **stated)
