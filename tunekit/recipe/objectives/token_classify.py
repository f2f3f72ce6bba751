"""`objective: token_classify` tags over words: a head that is trained with the adapter gives each word a tag."""

from tunekit.recipe.bases.label_settings import LabelSettings
from tunekit.records import Shows


class TokenClassifySettings(LabelSettings):
    """One label a word."""

    summary = "cross entropy on a tag for each word"
    family = "token_classifier"
    example = "tags"
    shows = Shows(unit="word")
    sums = (*LabelSettings.sums, "spans")
    first_order = 60
