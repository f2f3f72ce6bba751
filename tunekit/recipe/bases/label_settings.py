"""Settings of objectives that train a head with one score per label."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from tunekit.basics import Shows
from tunekit.formats.labels import MULTI_LABEL, PAIR_LABELS, REGRESSION, SINGLE_LABEL, label_field, label_text, of_cell
from tunekit.metrics.outputs import ROW_VALUES
from tunekit.recipe.bases.section import Fraction, ObjectiveSettings, Positive, Several, Text


def _label(value: object) -> object:
    """Converts a label of the recipe to text, in the form that labels of rows have."""
    return label_text(value) if isinstance(value, str | int) else value


def _each_once(labels: tuple[str, ...]) -> tuple[str, ...]:
    twice = next((label for number, label in enumerate(labels) if label in labels[:number]), None)
    if twice is not None:
        raise ValueError(f"names the label '{twice}' twice; each label is one output of the head")
    return labels


Label = Annotated[
    Text, BeforeValidator(_label), WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1}, {"type": "integer"}]})
]


def _weights(value: object) -> object:
    """Converts the labels in {label: weight} to text, in the form that labels of rows have."""
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
    """Settings of objectives with labels. Labels are read from the data, unless they are listed here."""

    shows = Shows(unit="label")
    sums: ClassVar[tuple[str, ...]] = (
        *("loss", "correct", "units", "labelled", "label_counts", "confusion", "calibration"),
    )
    supervised = True
    has_head = True
    names_labels = True
    training_keys: ClassVar[tuple[str, ...]] = ("class_weights", "label_smoothing")

    labels: Annotated[Several[Label], AfterValidator(_each_once)] = Field(
        (), description="all labels, in the order of the head's outputs; empty: the labels of the data, sorted"
    )
    class_weights: ClassWeights = Field(
        None,
        description="weight of each label in the training loss: balanced (rare labels count as much as frequent ones), "
        "or {label: weight}; labels that are not listed have weight 1",
    )
    label_smoothing: Fraction = Field(
        0.0, description="share of each target that is spread evenly over all labels, in training only"
    )

    @property
    def listed_labels(self) -> tuple[str, ...]:
        """The labels that the recipe lists."""
        return self.labels


ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
PROBLEM_TYPES: tuple[ProblemType, ...] = get_args(ProblemType)


class HeadSettings(ObjectiveSettings):
    """Settings of objectives whose head gives each row a vector of scores. They define the meaning of the scores."""

    problem_type: ProblemType = Field(
        "single_label_classification",
        description="the form of a row's label, with transformers' names. single_label_classification: one name; "
        "multi_label_classification: a list of names, also an empty one; regression: a number or a list of numbers",
    )

    fit_thresholds: bool = Field(
        False,
        description="for several labels per row. true: each evaluation chooses a probability threshold for each label, "
        "which gives the label's best F1 on the evaluation rows; false: the threshold of every label is 0.5",
    )

    @classmethod
    def for_rows(cls, rows: Sequence[Mapping[str, object]]) -> Mapping[str, str]:
        labels = [of_cell(row.get(label_field(row, PAIR_LABELS))) for row in rows]
        several = [label for label in labels if isinstance(label, list)]
        numbers = [each for label in labels for each in (label if isinstance(label, list) else [label])]
        if any(isinstance(each, float) and not each.is_integer() for each in numbers):
            return {"problem_type": REGRESSION}
        return {"problem_type": MULTI_LABEL} if several else {}

    @property
    def needs_evaluation(self) -> tuple[str, ...]:
        return ("fit_thresholds",) if self.fit_thresholds else ()

    @classmethod
    def sums_of(cls, facts: Mapping[str, Any]) -> tuple[str, ...]:
        return SUMS.get(facts.get("problem_type", SINGLE_LABEL), cls.sums)

    @classmethod
    def is_log_loss(cls, facts: Mapping[str, Any]) -> bool:
        return facts.get("problem_type") != REGRESSION

    @model_validator(mode="after")
    def _check_problem_type(self) -> Self:
        if self.fit_thresholds and self.problem_type != MULTI_LABEL:
            raise ValueError(f"fit_thresholds needs problem_type: {MULTI_LABEL}, not {self.problem_type}; remove it")
        if self.problem_type == SINGLE_LABEL:
            return self
        for name in ("class_weights", "label_smoothing"):
            if getattr(self, name):
                raise ValueError(f"{name} needs problem_type: {SINGLE_LABEL}, not {self.problem_type}; remove it")
        return self


SUMS: Mapping[str, tuple[str, ...]] = {  # the sums of an evaluation, if they differ from LabelSettings.sums
    MULTI_LABEL: ("loss", "units", "labelled", "label_counts"),
    REGRESSION: ("loss", "units", ROW_VALUES),
}
