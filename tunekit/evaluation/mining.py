"""Hard negatives: the documents that are most similar to a query, but clearly less similar than its positives."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunekit.objectives.losses.retrieval import cosines


@dataclass(frozen=True)
class QueryNegatives:
    """The negatives of a query. `places`: these documents, the most similar first, and `scores`: their cosines, or
    their probabilities by a reranker. `positive`: the smallest such number of the query's positives. `left_out`: the
    documents that are too similar to be negatives, the most similar first."""

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
    margin: float | None,
) -> Iterator[QueryNegatives]:
    """The negatives of each query: at most `count` documents whose cosine is at most p - |p| * margin, for the smallest
    cosine p of the query's positives. Documents with equal cosines are taken in their order. `margin` None: documents
    of any cosine.

    `relevant`, `excluded`: for each query, the places of its positives, and of other documents that are never taken.
    Shapes: queries (Q, D), documents (M, D).
    """
    for scores, positives, others in zip(cosines(queries, documents), relevant, excluded, strict=True):
        positive = float(scores[positives].min())
        scores[[*positives, *others]] = -torch.inf
        left_out = scores > (math.inf if margin is None else positive - abs(positive) * margin)  # (M,)
        similar = _first(torch.where(left_out, scores, -torch.inf), int(left_out.sum()))
        places = _first(scores.masked_fill(left_out, -torch.inf), count)
        yield QueryNegatives(places, scores[places].tolist(), positive, similar)


def rescored_negatives(
    candidates: Iterable[QueryNegatives],
    relevant: Sequence[Sequence[int]],
    score: Callable[[int, Sequence[int]], Sequence[float]],
    *,
    count: int,
    margin: float,
) -> Iterator[QueryNegatives]:
    """The negatives of each query among its candidates: at most `count` documents whose score is at most
    p (1 - margin), for the smallest score p of the query's positives, those with the highest score first. `score`: the
    scores of documents, from 0 to 1, by the query's number and the documents' places."""
    for number, (query, positives) in enumerate(zip(candidates, relevant, strict=True)):
        scores = score(number, [*positives, *query.places])
        positive = min(scores[: len(positives)])
        pairs = zip(scores[len(positives) :], query.places, strict=True)
        ranked = sorted(pairs, key=lambda pair: -pair[0])
        left_out = [place for value, place in ranked if value > positive * (1 - margin)]
        first = ranked[len(left_out) : len(left_out) + count]
        yield QueryNegatives([place for _, place in first], [value for value, _ in first], positive, left_out)


def _first(scores: Tensor, count: int) -> list[int]:
    """The places of the highest finite scores, at most `count`, the highest first. Shapes: scores (M,)."""
    count = min(count, int(scores.isfinite().sum()))
    if not count:
        return []
    candidates = (scores >= scores.topk(count).values[-1]).nonzero()[:, 0]
    order = scores[candidates].sort(descending=True, stable=True).indices[:count]
    places: list[int] = candidates[order].tolist()
    return places
