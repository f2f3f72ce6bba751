"""`objective: classify` sequence classification: a head that is trained with the adapter gives each text a label."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from tunekit.recipe.section import ObjectiveSettings, Several, Text


class ClassifySettings(ObjectiveSettings):
    """Labels are those of the data unless they are listed."""

    family: ClassVar[str] = "classifier"
    example: ClassVar[str] = "label"
    sums: ClassVar[tuple[str, ...]] = ("loss", "correct", "units", "confusion")
    supervised: ClassVar[bool] = True

    method: Literal["classify"] = Field("classify", description="cross entropy on one label for each text")
    labels: Several[Text] = Field(
        (), description="every label in the order of the head's rows; empty: those of the data, sorted"
    )
