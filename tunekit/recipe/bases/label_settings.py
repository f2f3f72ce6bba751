"""What objectives whose head has one score a label share: the labels."""

from typing import Annotated, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from tunekit.formats.labels import label_text
from tunekit.recipe.bases.section import ObjectiveSettings, Several, Text
from tunekit.records import Shows


def _label(value: object) -> object:
    """As the rows' labels are read."""
    return label_text(value) if isinstance(value, str | int) else value


def _each_once(labels: tuple[str, ...]) -> tuple[str, ...]:
    twice = next((label for number, label in enumerate(labels) if label in labels[:number]), None)
    if twice is not None:
        raise ValueError(f"names '{twice}' twice; each label is one row of the head")
    return labels


Label = Annotated[
    Text, BeforeValidator(_label), WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1}, {"type": "integer"}]})
]


class LabelSettings(ObjectiveSettings):
    """Labels are those of the data unless they are listed."""

    shows = Shows(unit="label")
    sums: ClassVar[tuple[str, ...]] = ("loss", "correct", "units", "confusion", "calibration")
    supervised = True
    has_head = True
    names_labels = True

    labels: Annotated[Several[Label], AfterValidator(_each_once)] = Field(
        (), description="every label in the order of the head's rows; empty: those of the data, sorted"
    )

    @property
    def listed_labels(self) -> tuple[str, ...]:
        """The labels that the recipe lists."""
        return self.labels
