"""The documents of `evaluation.corpus`, and BM25: the search without a model that embeddings are compared with."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from tunekit.data.encoding.sources import EncodedSource, load_sources, read_examples
from tunekit.data.rows import RowSet
from tunekit.errors import DataError, RecipeError, listed
from tunekit.formats.embedding import EmbeddingExample
from tunekit.objectives.losses.retrieval import find_relevance, ranks_of
from tunekit.objectives.rows.texts import text_key
from tunekit.recipe.data import Source
from tunekit.recipe.evaluation import EvaluationSection

KEY = "evaluation.corpus"
K1, B = 1.2, 0.75  # Lucene's defaults
SHOWN_PLACES = 5
WORD = re.compile(r"\w+")


def load_corpus(settings: EvaluationSection, rows: RowSet) -> EncodedSource | None:
    """The documents of `evaluation.corpus`, as rows of one text; None if the recipe names no file.

    Raises: RecipeError if the objective searches no documents; DataError if a row's positive is not in the file.
    """
    if settings.corpus is None:
        return None
    kind = rows.objective.rows.documents
    if kind is None:
        what = f"{settings.corpus} is not read, because this objective ({rows.objective.name}) searches no documents"
        raise RecipeError(what, "remove this key", key=KEY)
    [source] = load_sources([Source(path=settings.corpus)], kind, None)
    evaluation = [] if rows.evaluation is None else [rows.evaluation[number] for number in range(len(rows.evaluation))]
    keys = [row.parts["keys"].tolist() for row in evaluation]
    if missing := find_relevance(keys, source.store.parts["keys"].tolist()).missing:
        which = listed([evaluation[number].origin for number in missing], SHOWN_PLACES)
        what = f"the positives of {len(missing):,} evaluation rows ({which}) are not documents of this file"
        raise DataError(what, "add these texts, so that they can be found", file=settings.corpus, key=KEY)
    return source


def bm25_ranks(rows: RowSet, corpus: EncodedSource | None) -> list[list[int]]:
    """The ranks of each query's relevant documents by BM25, over the same queries and documents as the search by
    embeddings."""
    examples = [example_texts(written.example) for written in rows.evaluation_examples()]
    documents = list[str]()
    if corpus is not None:
        numbers = set(corpus.store.records["number"].tolist())
        documents = [example_texts(example)[0] for _, example in read_examples(corpus.source, "document", numbers)]
    keys = [list(map(text_key, texts)) for texts in (*examples, documents)]
    relevance = find_relevance(keys[:-1], keys[-1])
    texts = dict(zip(chain.from_iterable(keys), chain.from_iterable((*examples, documents)), strict=True))
    index = Bm25([texts[key] for key in relevance.documents])
    scores = (torch.from_numpy(index.scores(examples[number][0])) for number in relevance.queries)
    return [ranks_of(each, places) for each, places in zip(scores, relevance.relevant, strict=True)]


def example_texts(example: object) -> Sequence[str]:
    """The texts of an example of an objective that searches documents."""
    assert isinstance(example, EmbeddingExample)
    return example.texts


class Bm25:
    """Okapi BM25 over the words of texts, without case. Source: Robertson and Zaragoza 2009; Lucene's idf."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(words(text)) for text in texts]
        lengths = np.array([sum(each.values()) for each in counts], np.float64)  # (M,)
        self._norms = K1 * (1 - B + B * lengths / max(lengths.mean(), 1.0))
        places: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for place, each in enumerate(counts):
            for word, count in each.items():
                places[word].append((place, count))
        self._places = {word: np.array(pairs, np.int64).T for word, pairs in places.items()}

    def scores(self, query: str) -> NDArray[np.float64]:
        """The score of each document, (M,): sum over words of idf * f / (f + k1 (1 - b + b length / mean length))."""
        scores = np.zeros(len(self._norms))
        for word, times in Counter(words(query)).items():
            if word in self._places:
                documents, frequencies = self._places[word]
                idf = math.log(1 + (len(scores) - len(documents) + 0.5) / (len(documents) + 0.5))
                scores[documents] += times * idf * frequencies / (frequencies + self._norms[documents])
        return scores


def words(text: str) -> list[str]:
    """The words of a text, without case."""
    return WORD.findall(text.casefold())
