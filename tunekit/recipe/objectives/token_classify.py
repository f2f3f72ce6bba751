"""`objective: token_classify` tags over words: a head that is trained with the adapter gives each word a tag."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunekit.recipe.bases.label_settings import LabelSettings
from tunekit.recipe.bases.section import FirstRecipe
from tunekit.records import Shows


class TokenClassifySettings(LabelSettings):
    """One label a word."""

    family = "token_classifier"
    example = "tags"
    shows = Shows(unit="word")
    sums = (*LabelSettings.sums, "spans")
    first_recipe = FirstRecipe(order=60)

    method: Literal["token_classify"] = Field("token_classify", description="cross entropy on a tag for each word")
