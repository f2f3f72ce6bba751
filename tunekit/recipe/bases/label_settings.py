"""What objectives whose head has one score a label share: the labels."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from tunekit.formats.labels import label_text
from tunekit.recipe.bases.section import Fraction, ObjectiveSettings, Positive, Several, Text
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


def _weights(value: object) -> object:
    """The labels as those of the rows are read."""
    if isinstance(value, Mapping):
        return {str(_label(label)): weight for label, weight in value.items()}
    if value in (None, BALANCED):
        return value
    raise ValueError("must be balanced, or {label: weight, ...}")


BALANCED = "balanced"
ClassWeights = Annotated[
    dict[str, Positive] | Literal["balanced"] | None,
    BeforeValidator(_weights),
    WithJsonSchema(
        {
            "anyOf": [
                {"const": BALANCED},
                {"type": "object", "additionalProperties": {"type": "number", "exclusiveMinimum": 0}},
                {"type": "null"},
            ]
        }
    ),
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
    class_weights: ClassWeights = Field(
        None,
        description="weight of each label in the training loss: balanced (rare labels count as much as frequent ones), "
        "or {label: weight}, where the others have 1",
    )
    label_smoothing: Fraction = Field(
        0.0, description="share of each training target that is spread evenly over all labels; evaluation has none"
    )

    @property
    def listed_labels(self) -> tuple[str, ...]:
        """The labels that the recipe lists."""
        return self.labels
