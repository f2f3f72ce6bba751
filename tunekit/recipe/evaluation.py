"""`evaluation:` what is measured on the eval rows, and which checkpoint wins."""

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from tunekit.recipe.bases.paths import TaskPath
from tunekit.recipe.bases.section import Count, CountOrZero, Section, Several, Text

FROM_DATA = "from_data"
CHOICE_SUMS = frozenset(
    {"labelled", "label_counts", "confusion", "calibration"}
)  # what choosing adds to what an objective sums up
CHOICE_METRICS = ("accuracy", "macro_f1", "expected_calibration_error")  # always measured where answers are chosen

_BEST = re.compile(r"eval\.[a-z0-9_]+")


def check_best(value: object) -> str:
    """The name of an evaluation metric. Raises: ValueError if it is none."""
    if isinstance(value, str) and _BEST.fullmatch(value):
        return value
    raise ValueError("must be eval.METRIC, such as eval.loss")


def _choices(value: object) -> object:
    """A list of two texts or more, no two equal; a whole number is its text."""
    if value is None or value == FROM_DATA:
        return value
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be {FROM_DATA} or a list, such as [positive, negative]")
    if not all(isinstance(each, str | int) and not isinstance(each, bool) and str(each).strip() for each in value):
        raise ValueError("must be texts that are not empty; put true, false and numbers with a point in quotes")
    texts = tuple(map(str, value))
    same = next((text for at, text in enumerate(texts) if text.strip() in map(str.strip, texts[:at])), None)
    if same is not None:
        raise ValueError(f"names '{same.strip()}' twice")
    if len(texts) < 2:
        raise ValueError("needs two answers or more to choose from")
    return texts


def _content_free(value: object) -> str:
    if isinstance(value, str) and value.count("{}") == 1:
        return value
    raise ValueError("must be a text with {} once, in place of a row's own text, such as 'Review: {} Sentiment:'")


ANSWERS = {"type": "array", "minItems": 2, "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]}}
ChoiceList = Annotated[
    Several[Text] | Literal["from_data"] | None,
    BeforeValidator(_choices),
    WithJsonSchema({"anyOf": [ANSWERS, {"const": FROM_DATA}, {"type": "null"}]}),
]


class EvaluationSection(Section):
    """`best: eval.loss` exports the checkpoint where that metric was best; `patience` counts on it, or on eval.loss."""

    free_keys = ("before_training", "tasks", "task_documents", "task_lengths")

    choices: ChoiceList = Field(
        None, description="the answers to choose from by their log-probability; from_data: those of the rows"
    )
    choice_score: Literal["sum", "mean_per_token", "mean_per_byte"] = Field(
        "sum", description="what of an answer's log-probability is compared"
    )
    content_free_prompt: Annotated[str, BeforeValidator(_content_free)] | None = Field(
        None,
        description="calibrate choices (Zhao et al. 2021) by the rows' prompt, with {} for their own text",
    )
    metrics: Several[Text] = Field(("loss",), description="what is measured; loss always is")
    before_training: bool = Field(True, description="evaluate before the first step too, to compare the result with")
    generate: bool = Field(False, description="generate an answer for every eval row, for the metrics that need one")
    samples: CountOrZero = Field(
        0, description="answers to so many eval rows at each evaluation, for the report; no metric needs them"
    )
    max_new_tokens: Count = Field(128, description="tokens of one generated answer, at most")
    tasks: Several[TaskPath] = Field(
        (), description="tasks of lm-eval, by name or as YAML files, that compare the result with its base"
    )
    task_documents: Count | None = Field(None, description="use this many documents of each task; null: all")
    task_lengths: Several[Count] = Field((), description="the lengths in tokens of tasks that generate their texts")
    batch_size: Count = Field(8, description="rows of one evaluation forward; only memory and speed")
    best: Annotated[str, BeforeValidator(check_best)] | None = Field(
        None, description="export the checkpoint best in this"
    )
    patience: Count | None = Field(None, description="stop after this many evaluations without gain")
