"""Hard negatives: the documents that are most similar to a query, but clearly less similar than its positives."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunekit.objectives.losses.retrieval import cosines


@dataclass(frozen=True)
class QueryNegatives:
    """The negatives of a query. `places`: these documents, the most similar first, and `scores`: their cosines.
    `positive`: the smallest cosine of the query's positives. `left_out`: the documents that are too similar to be
    negatives, the most similar first."""

    places: list[int]
    scores: list[float]
    positive: float
    left_out: list[int]


def mine_negatives(
    queries: Tensor,
    documents: Tensor,
    relevant: Sequence[Sequence[int]],
    excluded: Sequence[Sequence[int]],
    *,
    count: int,
    margin: float,
) -> Iterator[QueryNegatives]:
    """The negatives of each query: at most `count` documents whose cosine is at most p - |p| * margin, for the smallest
    cosine p of the query's positives. Documents with equal cosines are taken in their order.

    `relevant`, `excluded`: for each query, the places of its positives, and of other documents that are never taken.
    Shapes: queries (Q, D), documents (M, D).
    """
    for scores, positives, others in zip(cosines(queries, documents), relevant, excluded, strict=True):
        positive = float(scores[positives].min())
        scores[[*positives, *others]] = -torch.inf
        left_out = scores > positive - abs(positive) * margin  # (M,)
        similar = _first(torch.where(left_out, scores, -torch.inf), int(left_out.sum()))
        places = _first(scores.masked_fill(left_out, -torch.inf), count)
        yield QueryNegatives(places, scores[places].tolist(), positive, similar)


def _first(scores: Tensor, count: int) -> list[int]:
    """The places of the highest finite scores, at most `count`, the highest first. Shapes: scores (M,)."""
    count = min(count, int(scores.isfinite().sum()))
    if not count:
        return []
    candidates = (scores >= scores.topk(count).values[-1]).nonzero()[:, 0]
    order = scores[candidates].sort(descending=True, stable=True).indices[:count]
    places: list[int] = candidates[order].tolist()
    return places
