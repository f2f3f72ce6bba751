"""`objective: classify` sequence classification: a head that is trained with the adapter gives each text a label,
several labels, or numbers."""

from tunekit.recipe.bases.label_settings import HeadSettings, LabelSettings


class ClassifySettings(HeadSettings, LabelSettings):
    """One label a text, or as `problem_type` says."""

    summary = "one label for each text, several labels, or numbers"
    family = "classifier"
    example = "label"
    first_order = 70
