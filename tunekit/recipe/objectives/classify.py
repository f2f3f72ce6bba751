"""`objective: classify` sequence classification: a head that is trained with the adapter gives each text a label."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunekit.recipe.bases.label_settings import LabelSettings
from tunekit.recipe.bases.section import FirstRecipe


class ClassifySettings(LabelSettings):
    """One label a text."""

    family = "classifier"
    example = "label"
    first_recipe = FirstRecipe(order=70)

    method: Literal["classify"] = Field("classify", description="cross entropy on one label for each text")
