"""Metrics of a search. Each reads the ranks (from 0) of all documents that are relevant to a query, in ascending order.

The formulas are those of sentence-transformers' InformationRetrievalEvaluator.
"""

from collections.abc import Callable, Sequence
from math import fsum, log2

Ranks = Sequence[int]


def accuracy(ranks: Ranks, cutoff: int) -> float:
    """1 if a relevant document is among the first `cutoff`, else 0."""
    return float(ranks[0] < cutoff)


def precision(ranks: Ranks, cutoff: int) -> float:
    """The share of the first `cutoff` documents that is relevant."""
    return sum(rank < cutoff for rank in ranks) / cutoff


def recall(ranks: Ranks, cutoff: int) -> float:
    """The share of the relevant documents that is among the first `cutoff`."""
    return sum(rank < cutoff for rank in ranks) / len(ranks)


def mrr(ranks: Ranks, cutoff: int) -> float:
    """1 / (rank of the first relevant document, from 1), or 0 if it is not among the first `cutoff`."""
    return 1 / (ranks[0] + 1) if ranks[0] < cutoff else 0.0


def map_at(ranks: Ranks, cutoff: int) -> float:
    """The mean over the relevant documents of the precision at each of them; 0 for those after the first `cutoff`."""
    precisions = [(number + 1) / (rank + 1) for number, rank in enumerate(ranks) if rank < cutoff]
    return sum(precisions) / min(cutoff, len(ranks))


def ndcg(ranks: Ranks, cutoff: int) -> float:
    """sum over relevant documents of 1 / log2(rank + 2), divided by its largest possible value."""
    gains = fsum(1 / log2(rank + 2) for rank in ranks if rank < cutoff)
    return gains / fsum(1 / log2(rank + 2) for rank in range(min(len(ranks), cutoff)))


QueryMeasure = Callable[[Ranks, int], float]
OF_QUERIES: dict[str, tuple[QueryMeasure, int]] = {  # metrics that each evaluation measures: the first is the main one
    "ndcg_at_10": (ndcg, 10),
    "mrr_at_10": (mrr, 10),
    "map_at_100": (map_at, 100),
    "recall_at_10": (recall, 10),
    "accuracy_at_1": (accuracy, 1),
}


def search_values(queries: Sequence[Ranks], cutoffs: Sequence[int]) -> dict[str, float]:
    """The means over queries: nDCG@10, MRR@10, MAP@100; accuracy, recall and precision at each of the cutoffs."""
    measures: dict[str, tuple[QueryMeasure, int]] = {
        "ndcg@10": (ndcg, 10),
        "mrr@10": (mrr, 10),
        "map@100": (map_at, 100),
    }
    for measure in (accuracy, recall, precision):
        measures |= {f"{measure.__name__}@{cutoff}": (measure, cutoff) for cutoff in sorted(cutoffs)}
    return {
        name: fsum(measure(ranks, cutoff) for ranks in queries) / len(queries)
        for name, (measure, cutoff) in measures.items()
    }


def search_table(rankings: dict[str, dict[str, float]]) -> tuple[list[str], list[list[str | float | None]]]:
    """Header and lines of a table of searches: a line for each metric, a column for each ranking."""
    names = list(dict.fromkeys(name for values in rankings.values() for name in values))
    return ["metric", *rankings], [[name, *(values.get(name) for values in rankings.values())] for name in names]
