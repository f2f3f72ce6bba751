"""`objective: embed`: embedding models (sentence-transformers), for search and for the similarity of texts. The loss
compares all rows of an optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from tunekit.basics import Shows
from tunekit.errors import DataError
from tunekit.formats.embedding import make_example
from tunekit.metrics.retrieval import OF_QUERIES
from tunekit.recipe.bases.section import AutoOrBool, Count, NotNegative, ObjectiveSettings, Positive, Section, Several
from tunekit.recipe.model import ModelSection

EmbedLossName = Literal[
    "multiple_negatives_ranking",
    "gist",
    "cosent",
    "angle",
    "cosine",
    "triplet",
    "contrastive",
    "online_contrastive",
    "margin_mse",
    "distill_kl",
]
SCORED = ("cosent", "angle", "cosine", "contrastive", "online_contrastive")  # pairs of texts with one number
TAUGHT = ("margin_mse", "distill_kl")  # rows with the scores of a teacher
ENCLOSED: Mapping[str, tuple[float, float]] = {  # the range of the number of a row
    "cosine": (-1.0, 1.0),
    "contrastive": (0.0, 1.0),
    "online_contrastive": (0.0, 1.0),
}
MARGINS: Mapping[str, float] = {"gist": 0.0, "triplet": 5.0, "contrastive": 0.5, "online_contrastive": 0.5}
TEMPERATURES: Mapping[str, float] = {"gist": 0.01, "distill_kl": 1.0}
RANKING = ("multiple_negatives_ranking", "gist")  # losses with the other rows of a step as negatives
SCALED = ("multiple_negatives_ranking", "cosent", "angle")
LABELS = ("contrastive", "online_contrastive")  # losses whose number is 1 (similar) or 0
LABELLED = ("average_precision", "pair_accuracy", "pair_f1")  # metrics of these labels
RETRIEVAL = ("triplets_right", "triplets", "queries", *OF_QUERIES)  # sums over rows, in this order
Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
PoolingMode = Literal["mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean"]


def _sizes(value: object) -> object:
    """A list of sizes as {size: weight 1}."""
    if isinstance(value, list | tuple):
        if len(set(map(str, value))) < len(value):
            raise ValueError("names a size twice; remove one")
        return dict.fromkeys(value, 1.0)
    return value


Matryoshka = Annotated[
    dict[Count, Positive],
    BeforeValidator(_sizes),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 1}},
                {"type": "object", "additionalProperties": {"type": "number", "exclusiveMinimum": 0}},
                {"type": "null"},
            ]
        }
    ),
]


class Hardness(Section):
    """More weight for hard negatives: `strength` times the cosine is added to the logits of some negatives."""

    mode: Literal["in_batch_negatives", "hard_negatives", "all_negatives"] = Field(
        "in_batch_negatives",
        description="the weighted negatives: documents of other rows, the row's own negatives, or both",
    )
    strength: Positive = Field(description="factor of the cosine that is added to the logits, such as 5 or 9")


class Prompts(Section):
    """Texts before the texts of rows; null: as in the base's folder."""

    query: str | None = Field(None, description="the text before each anchor; null: the base's prompt named query")
    document: str | None = Field(
        None, description="the text before each other text; null: the base's prompt named document"
    )


class MaxLengths(Section):
    """The maximum numbers of tokens; null: that of the base's folder, and at most data.max_length."""

    query: Count | None = Field(None, description="the maximum number of tokens of an anchor")
    document: Count | None = Field(None, description="the maximum number of tokens of each other text")


class EmbedSettings(ObjectiveSettings):
    """Settings of embedding models. The losses have sentence-transformers' formulas and defaults."""

    summary = "gives similar texts similar vectors, for search"
    family = "embedder"
    example = "embedding"
    answers = False
    supervised = True
    first_order = 45
    first_recipe = "embed-lora"
    first_rows = (16, 4)
    first_reasons: ClassVar[Mapping[str, str]] = {
        "multiple_negatives_ranking": "rows without scores: the other rows of a step are the negatives, so a step has "
        "64 rows; more rows are more negatives",
        "cosent": "two texts and their similarity: the loss reads the order of the similarities",
        "contrastive": "two texts and 1 or 0: similar or not",
        "margin_mse": "documents and a teacher's scores: the loss reads the differences of the scores",
    }
    shows: ClassVar[Shows] = Shows(unit="row")
    sums: ClassVar[tuple[str, ...]] = ("loss", "units", *RETRIEVAL)

    loss: EmbedLossName = Field(
        "multiple_negatives_ranking",
        description="multiple_negatives_ranking: anchor, positive and any negatives; gist: the same, without "
        "negatives that a guide finds too similar; triplet: anchor, positive, negative; cosent, angle, cosine: two "
        "texts and their similarity; contrastive, online_contrastive: two texts and 1 or 0; margin_mse, distill_kl: "
        "anchor, documents and their scores by a teacher",
    )
    scale: Positive | None = Field(
        None,
        description="factor of the similarities (1 / temperature), of multiple_negatives_ranking, cosent, angle; "
        "null: 20",
    )
    directions: Several[Direction] = Field(
        ("query_to_doc",),
        min_length=1,
        description="the comparisons of multiple_negatives_ranking; always with query_to_doc",
    )
    partition: Literal["joint", "per_direction"] = Field(
        "joint", description="one softmax over all directions, or the mean of one softmax for each"
    )
    hardness: Hardness | None = Field(
        None, description="more weight for the hard negatives of multiple_negatives_ranking"
    )
    margin: NotNegative | None = Field(
        None,
        description="the margin of triplet (null: 5), contrastive and online_contrastive (null: 0.5), gist (null: 0)",
    )
    margin_strategy: Literal["absolute", "relative"] = Field(
        "absolute",
        description="gist leaves out negatives whose similarity by the guide is above that of the positive, minus the "
        "margin (absolute), or minus this share of it (relative)",
    )
    temperature: Positive | None = Field(
        None, description="temperature of distill_kl (null: 1) and of gist (null: 0.01)"
    )
    guide: ModelSection | None = Field(
        None, description="the embedding model that tells gist which negatives are too similar to the anchor"
    )
    contrast_anchors: bool = Field(True, description="whether the other anchors of a step are negatives of gist")
    contrast_positives: bool = Field(
        True, description="whether gist also compares the positives of a step with each other"
    )
    matryoshka: Matryoshka | None = Field(
        None,
        description="sizes of shortened embeddings whose losses are added, such as [384, 128, 64]; {size: weight} "
        "states weights",
    )
    pooling: Literal["auto"] | PoolingMode = Field(
        "auto",
        description="how the vectors of a text's tokens become one; auto: as in the base's folder, else the "
        "mean for encoders and the last token for decoders",
    )
    normalize: AutoOrBool = Field(
        "auto", description="whether embeddings have length 1; auto: as in the base's folder, else true"
    )
    prompts: Prompts = Field(Prompts(), description="texts before the texts of rows")
    max_lengths: MaxLengths = Field(MaxLengths(), description="the maximum numbers of tokens of texts")

    @property
    def ranks(self) -> bool:
        """Whether the other rows of a step are negatives."""
        return self.loss in RANKING

    @property
    def reads_labels(self) -> bool:
        """Whether the number of a row is 1 or 0."""
        return self.loss in LABELS

    @property
    def single_row(self) -> str:
        """The reason why a step must not have only one row; empty if it may."""
        compared = self.ranks or self.loss in ("cosent", "angle")
        return f"{self.loss} compares the rows of a step with each other" if compared else ""

    @classmethod
    def for_rows(cls, rows: Sequence[Mapping[str, object]]) -> Mapping[str, str]:
        scores = list[tuple[float, ...]]()
        for row in rows:
            with suppress(DataError):  # the plan reports such rows
                scores.append(make_example(dict(row)).scores)
        if not any(scores):
            return {"loss": RANKING[0]}
        if any(len(each) > 1 for each in scores):
            return {"loss": TAUGHT[0]}
        return {"loss": "contrastive" if {number for each in scores for number in each} <= {0, 1} else "cosent"}

    @classmethod
    def first_metric(cls, facts: Mapping[str, Any]) -> str:
        loss = facts.get("loss", RANKING[0])
        return "average_precision" if loss in LABELS else "spearman" if loss in SCORED else "ndcg_at_10"

    @classmethod
    def sums_of(cls, facts: Mapping[str, Any]) -> tuple[str, ...]:
        from tunekit.metrics.outputs import ROW_VALUES
        from tunekit.metrics.pair_scores import PAIRS

        labelled = (PAIRS,) if facts.get("loss") in LABELS else ()
        return ("loss", "units", ROW_VALUES, *labelled) if facts.get("loss") in SCORED else cls.sums

    @classmethod
    def is_log_loss(cls, facts: Mapping[str, Any]) -> bool:
        return facts.get("loss", RANKING[0]) in RANKING

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        uses: dict[str, tuple[str, ...]] = {
            "scale": SCALED,
            "margin": tuple(MARGINS),
            "temperature": tuple(TEMPERATURES),
            **dict.fromkeys(("guide", "margin_strategy", "contrast_anchors", "contrast_positives"), ("gist",)),
            "directions": SCALED[:1],
            "partition": SCALED[:1],
            "hardness": SCALED[:1],
        }
        for name, losses in uses.items():
            if getattr(self, name) != type(self).model_fields[name].default and self.loss not in losses:
                raise ValueError(f"{name} has an effect only with loss {' or '.join(losses)}; remove it")
        if self.loss == "gist" and self.guide is None:
            raise ValueError("loss gist needs a guide; write guide: NAME, an embedding model")
        if "query_to_doc" not in self.directions or len(set(self.directions)) < len(self.directions):
            raise ValueError("directions must contain query_to_doc, and each direction once")
        same = {"query_to_query", "doc_to_doc"} & set(self.directions)
        if self.partition == "per_direction" and same:
            raise ValueError(f"partition: per_direction excludes {' and '.join(sorted(same))}; write joint")
        return self
