"""`objective: sft` supervised fine-tuning: next-token cross entropy on the supervised tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunekit.recipe.bases.section import FirstRecipe, ObjectiveSettings


class SftSettings(ObjectiveSettings):
    """No settings of its own."""

    supervised = True
    one_sequence = True
    first_recipe = FirstRecipe(order=90)

    method: Literal["sft"] = Field("sft", description="next-token cross entropy on the supervised tokens")
