"""`data:` the sources of rows, how rows are rendered, and which tokens are trained on."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from tunekit.recipe.bases.paths import FilePath, RowsPath
from tunekit.recipe.bases.section import Count, Number, Positive, Section, Seed, Several, Text
from tunekit.recipe.memory import size_bytes


class Source(Section):
    """One data source: a file (JSONL, JSON, CSV, Parquet, text), several such files, or a hub data set."""

    short = "path"

    path: RowsPath = Field(description="a file, a folder, a pattern such as data/*.parquet, or a data set of the hub")
    format: Text = Field("auto", description="the format of a row; auto chooses it by the columns, and prints why")
    weight: Positive = Field(
        1.0,
        description="copies of each row per epoch; 1.5: each row once, and a random half of the rows once more. "
        "With streaming: the share of the rows that come from this source, compared with the other sources' weights",
    )
    columns: dict[Text, Text] = Field(
        default_factory=dict, description="renames columns, as {COLUMN OF THE FILE: FIELD OF THE FORMAT}"
    )
    split: Text = Field("train", description="split of a hub data set")
    revision: Text = Field("main", description="branch, tag or commit of a hub data set")
    max_rows: Count | None = Field(None, description="use at most this many rows, drawn at random from all rows")
    draw_seed: Seed | None = Field(
        0, description="seed of max_rows' random draw, independent of training.seed; null: use the first rows"
    )
    streaming: bool = Field(
        False, description="read the rows during training, for data larger than memory (needs training.max_steps)"
    )


def _eval_rows(value: object) -> object:
    """Checks the type of data.eval: a number or a list of sources. A path has already been replaced by a source.
    Raises: ValueError for a bool, a text or another type."""
    if isinstance(value, bool) or not isinstance(value, int | float | list | tuple):
        raise ValueError("must be a fraction, a file, or a list of sources")
    return value


def _eval_kind(value: object) -> str:
    return "sources" if isinstance(value, list | tuple) else "fraction"


def _checked_size(value: str | None) -> str | None:
    """Raises: ValueError if the text is not a size."""
    if value is not None:
        size_bytes(value)
    return value


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

    train: Several[Source] = Field(min_length=1, description="a path, a source, or a list of paths and sources")
    eval: Annotated[EvalRows | None, AfterValidator(_none_of_zero)] = Field(
        None, description="a fraction of each training source, or sources as in train; null or 0: no evaluation rows"
    )
    train_on: Literal["assistant", "last", "all"] = Field(
        "assistant",
        description="the tokens to train on: assistant (all assistant turns), last (the last assistant turn) or all",
    )
    rewritten_answers: Literal["last", "each"] = Field(
        "last",
        description="if the chat template changes earlier answers (for example, drops their reasoning): train on the "
        "last answer only, or on each original answer in a separate row",
    )
    reasoning: Literal["template", "train", "mask", "drop"] = Field(
        "template",
        description="the reasoning (thinking) of answers: template (as the chat template leaves it), train (kept in "
        "every answer, and trained on with it), mask (kept, but not trained on) or drop",
    )
    chat_template: FilePath | None = Field(None, description="a Jinja file; null: the tokenizer's template")
    max_length: Annotated[Count, Field(ge=2)] = Field(2048, description="the maximum number of tokens in a row")
    excess_length: Literal["drop", "truncate", "split", "shrink", "error"] = Field(
        "drop",
        description="the action for rows longer than max_length, which the report counts. Images stay whole: truncate "
        "removes an image that does not fit, and split divides rows with images after answers. shrink: make the images "
        "of such a row smaller, or drop the row",
    )
    image_tokens: Literal["auto"] | Count = Field(
        "auto",
        description="the maximum number of tokens of an image; larger images are made smaller, also by servers of the "
        "trained model. auto: as the base's processor limits it",
    )
    image_cache: Annotated[str | None, AfterValidator(_checked_size)] = Field(
        "20GiB",
        description="the maximum size of the features of images on disk, in the cache folder: an image goes through "
        "the frozen vision tower once, also in later runs; null: features are not stored",
    )
    packing: bool = Field(
        False,
        description="join rows to packed rows of up to max_length tokens; micro_batch_size then counts packed rows, "
        "so a step contains more rows",
    )
    shuffle: bool = Field(
        True, description="read the rows in a random order, which depends on seed and epoch; false: in the file's order"
    )
