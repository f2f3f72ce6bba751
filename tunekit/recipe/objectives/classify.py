"""`objective: classify` sequence classification: a head that is trained with the adapter gives each text a label."""

from tunekit.recipe.bases.label_settings import LabelSettings


class ClassifySettings(LabelSettings):
    """One label a text."""

    summary = "cross entropy on one label for each text"
    family = "classifier"
    example = "label"
    first_order = 70
