"""`evaluation:` what is measured on the eval rows, and which checkpoint wins."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tunekit.recipe.section import Count, Section, Several, Text

_BEST = re.compile(r"eval\.[a-z0-9_]+")


def _best(value: object) -> Any:
    if isinstance(value, str) and _BEST.fullmatch(value):
        return value
    raise ValueError("must be eval.METRIC, such as eval.loss")


class EvaluationSection(Section):
    """`best: eval.loss` exports the checkpoint where that metric was best; `patience` counts on it, or on eval.loss."""

    metrics: Several[Text] = Field(("loss",), description="what is measured; loss always is")
    before_training: bool = Field(True, description="evaluate before the first step too, to compare the result with")
    generate: bool = Field(False, description="generate an answer for every eval row, for the metrics that need one")
    max_new_tokens: Count = Field(128, description="tokens of one generated answer, at most")
    batch_size: Count = Field(8, description="rows of one evaluation forward; only memory and speed")
    best: Annotated[str, BeforeValidator(_best)] | None = Field(None, description="export the checkpoint best in this")
    patience: Count | None = Field(None, description="stop after this many evaluations without gain")
