"""`objective: rerank`: rerankers (cross-encoders), which read a query and a document together and give one score: how
relevant the document is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tunekit.basics import Shows
from tunekit.recipe.bases.section import Count, ObjectiveSettings, Positive

RerankLossName = Literal[
    "binary_cross_entropy",
    "multiple_negatives_ranking",
    "lambda",
    "ranknet",
    "listnet",
    "plistmle",
    "mse",
    "margin_mse",
]
ENCLOSED: Mapping[str, tuple[float, float]] = {  # the range of labels
    "binary_cross_entropy": (0.0, 1.0),
    "lambda": (0.0, 30.0),  # the gain of a document is 2^label - 1
}
RANKED = ("queries", "ndcg_at_10", "mrr_at_10", "map")  # sums over queries, in this order
CORRELATED = ("spearman", "pearson")  # metrics of a teacher's scores


class RerankSettings(ObjectiveSettings):
    """Settings of rerankers. The losses have sentence-transformers' formulas and defaults."""

    summary = "scores how relevant a document is to a query"
    family = "classifier"
    example = "reranking"
    answers = False
    has_head = True
    single_score = True
    shows: ClassVar[Shows] = Shows(unit="row")
    sums: ClassVar[tuple[str, ...]] = ("loss", "units", *RANKED)

    loss: RerankLossName = Field(
        "binary_cross_entropy",
        description="binary_cross_entropy: labels from 0 to 1; multiple_negatives_ranking: a positive, with documents "
        "of other rows as negatives; lambda, ranknet, listnet, plistmle: lists of documents with labels; mse, "
        "margin_mse: scores of a teacher",
    )
    template: str | None = Field(
        None,
        description="the text that the base reads, with {query} and {document}; null: both texts as a pair, or for a "
        "causal language model a question whose answer is yes or no",
    )
    num_negatives: Count | None = Field(
        None,
        description="documents of other rows that multiple_negatives_ranking draws for each query in each step; "
        "null: 4",
    )
    scale: Positive | None = Field(
        None, description="factor of the probabilities of multiple_negatives_ranking; null: 10"
    )
    pos_weight: Positive | None = Field(
        None, description="weight of relevant documents in binary_cross_entropy; null: 1"
    )

    @property
    def draws(self) -> bool:
        """Whether documents of other rows are negatives."""
        return self.loss == "multiple_negatives_ranking"

    @property
    def single_row(self) -> str:
        return f"{self.loss} takes negatives from the other rows of a step" if self.draws else ""

    @classmethod
    def sums_of(cls, facts: Mapping[str, Any]) -> tuple[str, ...]:
        from tunekit.metrics.outputs import ROW_VALUES

        return ("loss", "units", ROW_VALUES) if facts.get("loss") == "mse" else cls.sums

    @classmethod
    def is_log_loss(cls, facts: Mapping[str, Any]) -> bool:
        return facts.get("loss", "binary_cross_entropy") in ("binary_cross_entropy", "multiple_negatives_ranking")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        uses = {
            "num_negatives": "multiple_negatives_ranking",
            "scale": "multiple_negatives_ranking",
            "pos_weight": "binary_cross_entropy",
        }
        for name, loss in uses.items():
            if getattr(self, name) is not None and self.loss != loss:
                raise ValueError(f"{name} has an effect only with loss {loss}; remove it")
        if self.template is not None and any(self.template.count(field) != 1 for field in ("{query}", "{document}")):
            raise ValueError("template must contain {query} and {document} once each")
        return self
