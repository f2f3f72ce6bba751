"""`objective: classify`: text classification. A head, trained with the adapter, predicts a label, several labels or
numbers for each text."""

from tunekit.recipe.bases.label_settings import HeadSettings, LabelSettings


class ClassifySettings(HeadSettings, LabelSettings):
    """Settings of text classification. Each text has one label; with another `problem_type`, several labels or
    numbers."""

    summary = "predicts one label, several labels or numbers for each text"
    family = "classifier"
    example = "label"
    first_order = 70
