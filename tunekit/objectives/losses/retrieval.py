"""Searches: the ranks of each query's relevant documents among all documents of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 2**24  # scores that are computed together


class EmbeddedRow(NamedTuple):
    """A row with the embeddings of its texts, (texts of the row, D), their keys, the row's scores, and the embeddings
    of its texts by the guide of the loss, if it has one."""

    number: int
    texts: Tensor
    keys: list[int]
    scores: tuple[float, ...]
    guide: Tensor | None = None


@dataclass(frozen=True)
class Relevance:
    """The queries and documents of evaluation rows. `queries`: for each distinct anchor, the index of its first row.
    `documents`: the place of each document, by the hash of its text. `relevant`: for each query, the places of the
    positives of all rows with this anchor. `missing`: rows whose positive is not a document."""

    queries: Sequence[int]
    documents: dict[int, int]
    relevant: Sequence[Sequence[int]]
    missing: Sequence[int] = ()


def find_relevance(rows: Sequence[Sequence[int]], corpus: Iterable[int] = ()) -> Relevance:
    """The queries and documents of these rows. `rows`: the hashes of each row's texts. `corpus`: the hashes of the
    documents, in the order of their places; empty: all distinct texts of the rows but the anchors."""
    documents = dict[int, int]()
    for key in corpus or (key for _, *others in rows for key in others):
        documents.setdefault(key, len(documents))
    first, relevant, missing = dict[int, int](), dict[int, set[int]](), []
    for number, (anchor, positive, *_) in enumerate(rows):
        if positive not in documents:
            missing.append(number)
            continue
        first.setdefault(anchor, number)
        relevant.setdefault(anchor, set()).add(documents[positive])
    return Relevance(list(first.values()), documents, [sorted(relevant[anchor]) for anchor in first], missing)


def search_vectors(
    relevance: Relevance, texts: Sequence[Tensor], keys: Sequence[Sequence[int]], corpus: Mapping[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """The embeddings of all queries, (Q, D), and of all documents, (M, D), in the order of their places. `texts`,
    `keys`: the embeddings and hashes of each row's texts. `corpus`: the documents, if they are not those of the rows.
    """
    vectors = corpus or {
        key: vector
        for row, some in zip(keys, texts, strict=True)
        for key, vector in zip(row[1:], some[1:], strict=True)
    }
    queries = torch.stack([texts[number][0] for number in relevance.queries])
    return queries, torch.stack([vectors[key] for key in relevance.documents])


def search_ranks(queries: Tensor, documents: Tensor, relevant: Sequence[Sequence[int]]) -> list[list[int]]:
    """The ranks of each query's relevant documents by the cosine, from 0, in ascending order.

    Shapes: queries (Q, D), documents (M, D).
    """
    return [ranks_of(scores, places) for scores, places in zip(cosines(queries, documents), relevant, strict=True)]


def cosines(queries: Tensor, documents: Tensor) -> Iterator[Tensor]:
    """The cosines of each query with all documents, (M,). Shapes: queries (Q, D), documents (M, D)."""
    queries, documents = F.normalize(queries, dim=-1), F.normalize(documents, dim=-1)
    size = max(BLOCK // len(documents), 1)
    for start in range(0, len(queries), size):
        yield from queries[start : start + size] @ documents.T


def ranks_of(scores: Tensor, places: Sequence[int]) -> list[int]:
    """The ranks of the documents at these places, from 0, in ascending order. Documents with equal scores are ranked in
    the order of their places. Shapes: scores (M,)."""
    return sorted(int((scores > scores[at]).sum()) + int((scores[:at] == scores[at]).sum()) for at in places)


def triplets_right(texts: Tensor) -> int:
    """How many negatives are less similar to the anchor than the positive is. Shapes: texts (2 + negatives, D)."""
    cosines = F.normalize(texts[1:], dim=-1) @ F.normalize(texts[0], dim=-1)
    return int((cosines[0] > cosines[1:]).sum()) if len(cosines) > 1 else 0
