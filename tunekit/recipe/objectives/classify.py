"""`objective: classify`: text classification. A head, trained with the adapter, predicts a label, several labels or
numbers for each text."""

from tunekit.recipe.bases.label_settings import HeadSettings, LabelSettings


class ClassifySettings(HeadSettings, LabelSettings):
    """One label for each text; with another `problem_type`, several labels or numbers."""

    summary = "one label for each text, several labels, or numbers"
    family = "classifier"
    example = "label"
    first_order = 70
