"""`data:` where the rows come from, how they are rendered and which tokens are trained on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunekit.recipe.section import Count, Number, Positive, Section


class Source(Section):
    """One data source: a file (JSONL, JSON, CSV, Parquet) or a hub data set.

    `columns` maps the file's column to the format's field; `weight` w takes floor(w) copies plus a seeded draw.
    """

    path: str = Field(min_length=1)
    format: str = "auto"
    weight: Positive = 1.0
    columns: dict[str, str] = Field(default_factory=dict)
    split: str = "train"
    revision: str = "main"
    max_rows: Count | None = None
    streaming: bool = False


class DataSection(Section):
    """Training and evaluation rows."""

    train: tuple[Source, ...] = Field(min_length=1)
    eval: Annotated[Number, Field(gt=0, lt=1)] | tuple[Source, ...] | None = None
    train_on: Literal["assistant", "last", "all"] = "assistant"
    chat_template: str | None = None
    max_length: Annotated[Count, Field(ge=2)] = 2048
    excess_length: Literal["drop", "truncate", "split", "error"] = "drop"
    packing: Literal["auto"] | bool = "auto"
    shuffle: bool = True
