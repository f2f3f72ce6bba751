"""Metrics of retrieval: how high each query ranks its relevant documents among all documents of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tunekit.contracts import Array

BLOCK = 256  # queries whose scores are computed together
CUTOFF = 10


def retrieval_scores(texts: Sequence[Tensor], keys: Sequence[Array]) -> list[tuple[float, float, float]]:
    """For each row: accuracy@1, MRR@10 and nDCG@10 of its anchor. The documents are the distinct texts of all rows but
    the anchors; relevant are the positives of all rows with the same anchor. Documents with equal scores are ranked in
    the order of the rows.

    `texts`: the embeddings of each row, (texts of the row, D); `keys`: the hash of each text.
    """
    first, documents = dict[int, int](), list[Tensor]()
    relevant: dict[int, set[int]] = {}
    for vectors, row_keys in zip(texts, keys, strict=True):
        anchor, *others = row_keys.tolist()
        for key, vector in zip(others, vectors[1:], strict=True):
            if key not in first:
                first[key] = len(documents)
                documents.append(vector)
        relevant.setdefault(anchor, set()).add(first[others[0]])
    corpus = F.normalize(torch.stack(documents), dim=-1)  # (M, D)
    results = []
    for start in range(0, len(texts), BLOCK):
        queries = F.normalize(torch.stack([vectors[0] for vectors in texts[start : start + BLOCK]]), dim=-1)
        for scores, row_keys in zip(queries @ corpus.T, keys[start : start + BLOCK], strict=True):
            results.append(of_ranks([_rank(scores, place) for place in relevant[int(row_keys[0])]]))
    return results


def of_ranks(ranks: Sequence[int]) -> tuple[float, float, float]:
    """accuracy@1, MRR@10 and nDCG@10 of a query. `ranks`: the ranks of all relevant documents, from 0."""
    gains = math.fsum(1 / math.log2(rank + 2) for rank in ranks if rank < CUTOFF)
    ideal = math.fsum(1 / math.log2(rank + 2) for rank in range(min(len(ranks), CUTOFF)))
    best = min(ranks)
    return float(best == 0), 1 / (best + 1) if best < CUTOFF else 0.0, gains / ideal


def _rank(scores: Tensor, place: int) -> int:
    """The number of documents that are ranked before the document `place`. Shapes: scores (M,)."""
    higher, equal = scores > scores[place], scores[:place] == scores[place]
    return int(higher.sum()) + int(equal.sum())
