"""Metrics of one query's reranked documents, with the formulas of sentence-transformers' CrossEncoderRerankingEvaluator
and of scikit-learn. They treat documents with equal scores as they do.

Letters: n documents; relevant (n,) 1 or 0; scores (n,).
"""

from collections.abc import Sequence

import numpy as np

from tunekit.contracts import Array

CUTOFF = 10  # of nDCG and MRR


def ranking_metrics(relevant: Sequence[float], scores: Sequence[float]) -> list[float]:
    """nDCG@10, MRR@10 and average precision of a query; all 0 if no document is relevant."""
    if not any(relevant):
        return [0.0, 0.0, 0.0]
    wanted, values = np.array(relevant, np.float64), np.array(scores)
    return [_ndcg(wanted, values), _mrr(wanted, values), _average_precision(wanted, values)]


def order_of(scores: Sequence[float] | Array) -> Array:
    """The places of documents, those with the highest score first."""
    order: Array = np.argsort(np.asarray(scores))[::-1]
    return order


def _ndcg(relevant: Array, scores: Array) -> float:
    """The discounted gain over that of the best order. Documents with equal scores share the mean of their gains."""
    best = np.sum(1 / np.log2(np.arange(2, min(int(relevant.sum()), CUTOFF) + 2)))
    if len(relevant) == 1:
        return float(relevant[0] / best)
    discounts = 1 / (np.log(np.arange(len(scores)) + 2) / np.log(2))
    discounts[CUTOFF:] = 0
    summed = np.cumsum(discounts)
    _, group, counts = np.unique(-scores, return_inverse=True, return_counts=True)
    gains = np.zeros(len(counts))
    np.add.at(gains, group, relevant)
    gains /= counts
    of_groups = np.diff(summed[np.cumsum(counts) - 1], prepend=0.0)
    return float((gains * of_groups).sum() / best)


def _mrr(relevant: Array, scores: Array) -> float:
    """1 / (rank of the first relevant document, from 1), or 0 if it is not among the first 10."""
    first = np.flatnonzero(relevant[order_of(scores)[:CUTOFF]])
    return 1 / (int(first[0]) + 1) if len(first) else 0.0


def _average_precision(relevant: Array, scores: Array) -> float:
    """sum over thresholds of (recall - recall before) * precision. Documents with equal scores pass a threshold
    together."""
    order = np.argsort(scores, kind="stable")[::-1]
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    found = np.cumsum(relevant[order])[ends]  # relevant documents above each threshold
    precision, recall = found / (ends + 1), found / found[-1]
    steps = np.diff(np.append(recall[::-1], 0.0))
    return float(max(0.0, -np.sum(steps * precision[::-1])))
