"""`objective: token_classify`: token classification. A head, trained with the adapter, predicts a tag for each word."""

from tunekit.basics import Shows
from tunekit.recipe.bases.label_settings import LabelSettings


class TokenClassifySettings(LabelSettings):
    """Settings of token classification: one tag for each word."""

    summary = "cross entropy on a tag for each word"
    family = "token_classifier"
    example = "tags"
    shows = Shows(unit="word")
    sums = (*LabelSettings.sums, "spans")
    first_order = 60
