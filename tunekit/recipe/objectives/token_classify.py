"""`objective: token_classify` tags over words: a head that is trained with the adapter gives each word a tag."""

from tunekit.recipe.bases.label_settings import LabelSettings
from tunekit.recipe.bases.section import LABEL_METRICS, FirstRecipe
from tunekit.records import Shows


class TokenClassifySettings(LabelSettings):
    """One label a word."""

    summary = "cross entropy on a tag for each word"
    family = "token_classifier"
    example = "tags"
    shows = Shows(unit="word")
    sums = (*LabelSettings.sums, "spans")
    first_recipe = FirstRecipe(order=60, evaluation=LABEL_METRICS)
