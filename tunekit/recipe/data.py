"""`data:` where the rows come from, how they are rendered and which tokens are trained on."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from tunekit.recipe.bases.paths import FilePath, RowsPath
from tunekit.recipe.bases.section import Count, Number, Positive, Section, Seed, Several, Text


class Source(Section):
    """One data source: a file (JSONL, JSON, CSV, Parquet) or a hub data set."""

    short = "path"

    path: RowsPath = Field(description="a file, or a data set of the hub")
    format: Text = Field("auto", description="what a row is; auto decides from the columns and prints why")
    weight: Positive = Field(1.0, description="floor(w) copies an epoch plus a seeded draw of the rest")
    columns: dict[Text, Text] = Field(default_factory=dict, description="the file's column: the format's field")
    split: Text = Field("train", description="split of a hub data set")
    revision: Text = Field("main", description="branch, tag or commit of a hub data set")
    max_rows: Count | None = Field(None, description="use no more rows than this, drawn from all of them")
    draw_seed: Seed | None = Field(
        0, description="of max_rows: which rows are drawn, the same whatever training.seed is; null: the first ones"
    )
    streaming: bool = Field(False, description="larger than memory: read on the fly (needs training.max_steps)")


def _eval_rows(value: object) -> object:
    """Neither true nor a text in quotes is a fraction; a path has become a source before this."""
    if isinstance(value, bool) or not isinstance(value, int | float | list | tuple):
        raise ValueError("must be a fraction, a file, or a list of sources")
    return value


def _eval_kind(value: object) -> str:
    return "sources" if isinstance(value, list | tuple) else "fraction"


def _none_of_zero(value: object) -> object:
    return None if value == 0 else value


EvalFraction = Annotated[Number, Field(ge=0, lt=1)]
EvalRows = Annotated[
    Annotated[EvalFraction, Tag("fraction")] | Annotated[Several[Source], Field(min_length=1), Tag("sources")],
    Discriminator(_eval_kind),
    BeforeValidator(_eval_rows),
]


class DataSection(Section):
    """Training and evaluation rows."""

    train: Several[Source] = Field(min_length=1, description="a path, a source, or a list of either")
    eval: Annotated[EvalRows | None, AfterValidator(_none_of_zero)] = Field(
        None, description="a fraction of each training source, or sources like train; 0: none, as null"
    )
    train_on: Literal["assistant", "last", "all"] = Field("assistant", description="which tokens are trained on")
    rewritten_answers: Literal["last", "each"] = Field(
        "last",
        description="where the chat template rewrites earlier answers (drops their thinking, for one): train on the "
        "last, or on each as it was given, in a row of its own",
    )
    chat_template: FilePath | None = Field(None, description="a Jinja file; null is the tokenizer's own template")
    max_length: Annotated[Count, Field(ge=2)] = Field(2048, description="tokens of the longest row")
    excess_length: Literal["drop", "truncate", "split", "error"] = Field(
        "drop", description="what becomes of longer rows; always counted in the report"
    )
    packing: bool = Field(
        False, description="pack rows to max_length; micro_batch_size then counts packs, so that a step has more rows"
    )
    shuffle: bool = Field(True, description="order from (seed, epoch); false keeps the file's order")
