"""`evaluation:` the metrics on the evaluation rows, and the choice of the checkpoint to export."""

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from tunekit.recipe.bases.paths import RowsPath, TaskPath
from tunekit.recipe.bases.section import Count, CountOrZero, Section, Several, Text

FROM_DATA = "from_data"
# the sums that `choices` adds to the sums of an objective
CHOICE_SUMS = frozenset({"labelled", "label_counts", "confusion", "calibration"})
CHOICE_METRICS = ("accuracy", "macro_f1", "expected_calibration_error")  # always measured with `choices`

_BEST = re.compile(r"eval\.[a-z0-9_]+")


def check_best(value: object) -> str:
    """The name of an evaluation metric, such as eval.loss. Raises: ValueError for any other text."""
    if isinstance(value, str) and _BEST.fullmatch(value):
        return value
    raise ValueError("must be eval.METRIC, such as eval.loss")


def _choices(value: object) -> object:
    """Converts the listed choices to a tuple of at least two different texts; whole numbers become texts. Raises:
    ValueError for other values."""
    if value is None or value == FROM_DATA:
        return value
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be {FROM_DATA} or a list, such as [positive, negative]")
    if not all(isinstance(each, str | int) and not isinstance(each, bool) and str(each).strip() for each in value):
        raise ValueError(
            "contains an empty text, or true, false or a decimal number without quotes; put them in quotes"
        )
    texts = tuple(map(str, value))
    same = next((text for at, text in enumerate(texts) if text.strip() in map(str.strip, texts[:at])), None)
    if same is not None:
        raise ValueError(f"names the answer '{same.strip()}' twice; remove one")
    if len(texts) < 2:
        raise ValueError("needs at least two answers to choose from")
    return texts


def _content_free(value: object) -> str:
    if isinstance(value, str) and value.count("{}") == 1:
        return value
    raise ValueError("must be a text with exactly one {}, in place of the row's text, such as 'Review: {} Sentiment:'")


ANSWERS = {"type": "array", "minItems": 2, "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]}}
ChoiceList = Annotated[
    Several[Text] | Literal["from_data"] | None,
    BeforeValidator(_choices),
    WithJsonSchema({"anyOf": [ANSWERS, {"const": FROM_DATA}, {"type": "null"}]}),
]


class EvaluationSection(Section):
    """Settings of evaluations. `best: eval.loss` exports the checkpoint with the best value of this metric. `patience`
    counts the evaluations in which the metric of `best` (by default eval.loss) does not improve."""

    free_keys = ("before_training", "tasks", "task_documents", "task_lengths", "task_chat_template")

    choices: ChoiceList = Field(
        None,
        description="the possible answers; the model's answer is the most probable one. from_data: all answers in the "
        "rows",
    )
    choice_score: Literal["sum", "mean_per_token", "mean_per_byte"] = Field(
        "sum", description="the score of an answer: the sum of its log-probabilities, or their mean"
    )
    content_free_prompt: Annotated[str, BeforeValidator(_content_free)] | None = Field(
        None,
        description="the prompt of the rows with {} in place of a row's text; it calibrates the scores of `choices` "
        "(Zhao et al. 2021)",
    )
    metrics: Several[Text] = Field(("loss",), description="the metrics of an evaluation; loss is always measured")
    before_training: bool = Field(True, description="also evaluate before the first step, for comparison")
    generate: bool = Field(
        False, description="generate an answer to every evaluation row, for metrics that score answers"
    )
    samples: CountOrZero = Field(
        0, description="each evaluation generates answers to this many rows for the report; metrics do not use them"
    )
    max_new_tokens: Count = Field(128, description="the maximum number of tokens of a generated answer")
    tasks: Several[TaskPath] = Field(
        (), description="compare the result with its base on these tasks of lm-eval: names or YAML files"
    )
    task_documents: Count | None = Field(None, description="use this many documents of each task; null: all")
    task_lengths: Several[Count] = Field(
        (), description="prompt lengths in tokens, for tasks that generate their prompts (RULER)"
    )
    task_chat_template: bool = Field(False, description="format the prompts of tasks with the chat template")
    corpus: RowsPath | None = Field(
        None,
        description="a file of documents (column text; optional: title) that an evaluation of embeddings searches; "
        "null: the documents of the evaluation rows",
    )
    cutoffs: Several[Count] = Field(
        (1, 3, 5, 10),
        min_length=1,
        description="the table of searches has accuracy, recall and precision of so many first documents",
    )
    batch_size: Count = Field(8, description="number of rows in one forward pass; affects only memory and speed")
    best: Annotated[str, BeforeValidator(check_best)] | None = Field(
        None, description="export the checkpoint with the best value of this metric"
    )
    patience: Count | None = Field(None, description="stop after this many evaluations without improvement")
