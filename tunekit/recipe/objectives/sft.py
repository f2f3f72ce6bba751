"""`objective: sft` supervised fine-tuning: next-token cross entropy on the supervised tokens."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from tunekit.recipe.bases.section import FirstRecipe, ObjectiveSettings


class SftSettings(ObjectiveSettings):
    """No settings of its own."""

    supervised: ClassVar[bool] = True
    one_sequence: ClassVar[bool] = True
    first_recipe: ClassVar[FirstRecipe] = FirstRecipe(order=90)

    method: Literal["sft"] = Field("sft", description="next-token cross entropy on the supervised tokens")
