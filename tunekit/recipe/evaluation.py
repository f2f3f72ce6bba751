"""`evaluation:` what is measured on the eval rows, and which checkpoint wins."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunekit.recipe.section import Count, Section


class EvaluationSection(Section):
    """`best: eval.loss` exports the checkpoint where that metric was best; `patience` evaluations without gain stop."""

    metrics: tuple[str, ...] = ("loss",)
    generate: bool = False
    max_new_tokens: Count = 128
    batch_size: Count = 8
    best: Annotated[str, Field(pattern=r"^eval\.[a-z0-9_]+$")] | None = None
    patience: Count | None = None
