"""Metrics of searches, triplets and labelled pairs: against sentence-transformers' evaluators where they are installed,
on random data with ties, and against plain formulas."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tunekit.evaluation.retrieval import Bm25
from tunekit.metrics.outputs import pearson, spearman
from tunekit.metrics.pair_scores import average_precision, best_accuracy, best_f1
from tunekit.metrics.retrieval import map_at, ndcg, recall, search_values
from tunekit.objectives.losses.embeddings import distinct_groups
from tunekit.objectives.losses.retrieval import find_relevance, ranks_of, search_ranks, triplets_right

HAS_ORACLE = importlib.util.find_spec("sentence_transformers") is not None
needs_oracle = pytest.mark.skipif(not HAS_ORACLE, reason="sentence_transformers is not installed")


def signs(count: int, seed: int) -> Tensor:
    """Vectors of +1 and -1, whose cosines are exact and often equal."""
    return torch.randint(0, 2, (count, 4), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


@needs_oracle
def test_searches_have_the_values_of_sentence_transformers() -> None:
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.util import cos_sim

    queries, documents = signs(40, 0), signs(150, 1)
    generator = np.random.default_rng(0)
    relevant = [sorted(generator.choice(150, generator.integers(1, 15), replace=False).tolist()) for _ in queries]
    names = {f"{place:03}": str(place) for place in range(150)}
    evaluator = InformationRetrievalEvaluator(
        {str(place): f"q{place}" for place in range(40)},
        {name: f"d{place}" for name, place in names.items()},
        {str(place): {f"{at:03}" for at in some} for place, some in enumerate(relevant)},
        score_functions={"cosine": cos_sim},
    )

    def embed(texts: list[str], **_: Any) -> Tensor:
        return torch.stack([(queries if text[0] == "q" else documents)[int(text[1:])] for text in texts])

    model: Any = SimpleNamespace(encode_query=embed, encode_document=embed)
    theirs = evaluator.compute_all_metrics(model)["cosine"]
    ours = search_values(search_ranks(queries, documents, relevant), (1, 3, 5, 10))
    for name, value in ours.items():
        metric, cutoff = name.split("@")
        assert value == pytest.approx(theirs[f"{metric}@k"][int(cutoff)], rel=1e-15), name


@needs_oracle
def test_labelled_pairs_have_the_values_of_sentence_transformers() -> None:
    from sentence_transformers.sentence_transformer.evaluation import BinaryClassificationEvaluator as Theirs
    from sklearn.metrics import average_precision_score

    for seed in range(20):
        generator = np.random.default_rng(seed)
        scores, labels = generator.integers(0, 9, 60) / 8, generator.integers(0, 2, 60)
        pairs = list(zip(scores.tolist(), labels.tolist(), strict=True))
        assert best_accuracy(pairs) == Theirs.find_best_acc_and_threshold(scores, labels, True)[0]
        assert best_f1(pairs) == pytest.approx(Theirs.find_best_f1_and_threshold(scores, labels, True)[0], rel=1e-15)
        assert average_precision(pairs) == pytest.approx(average_precision_score(labels, scores), rel=1e-15)


@pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="scipy is not installed")
@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_those_of_scipy(ties: bool) -> None:
    from scipy.stats import pearsonr, spearmanr

    for seed in range(20):
        generator = np.random.default_rng(seed)
        scores, values = generator.normal(size=60), generator.normal(size=60)
        if ties:
            scores, values = np.round(scores, 1), np.round(values)
            assert len(set(values.tolist())) < 20
        assert spearman(scores.tolist(), values.tolist()) == pytest.approx(spearmanr(scores, values)[0], rel=1e-12)
        assert pearson(scores.tolist(), values.tolist()) == pytest.approx(pearsonr(scores, values)[0], rel=1e-12)


def test_metrics_of_one_query() -> None:
    assert ndcg([0, 3], 10) == pytest.approx((1 + 1 / np.log2(5)) / (1 + 1 / np.log2(3)))
    assert ndcg([20], 10) == 0
    assert map_at([1, 3], 100) == (1 / 2 + 2 / 4) / 2
    assert recall([0, 10], 10) == 0.5


def test_equal_scores_are_ranked_in_the_order_of_documents() -> None:
    assert ranks_of(torch.tensor([2.0, 3.0, 2.0, 2.0]), [3, 2]) == [2, 3]


def test_labelled_pairs_by_plain_values() -> None:
    pairs = [(0.9, 1.0), (0.5, 0.0), (0.5, 1.0), (0.1, 0.0)]
    assert best_accuracy(pairs) == 0.75
    assert best_f1(pairs) == pytest.approx(0.8)
    assert average_precision(pairs) == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_queries_count_once_and_all_their_positives_are_relevant() -> None:
    found = find_relevance([(1, 10), (2, 11, 12), (1, 12)])
    assert (list(found.queries), found.documents, found.relevant) == ([0, 1], {10: 0, 11: 1, 12: 2}, [[0, 2], [1]])
    found = find_relevance([(1, 10), (2, 11)], [11])
    assert (list(found.queries), list(found.missing)) == ([1], [0])


def test_a_negative_as_similar_as_the_positive_is_wrong() -> None:
    assert triplets_right(torch.tensor([[1.0, 0], [1, 1], [1, 1], [0, 1]])) == 1


def test_bm25_is_its_formula_and_ignores_case() -> None:
    index = Bm25(["The red car", "a blue car, a car", ""])
    idf, mean = np.log(1 + (3 - 2 + 0.5) / (2 + 0.5)), 8 / 3
    wanted = [idf * count / (count + 1.2 * (0.25 + 0.75 * size / mean)) for count, size in ((1, 3), (2, 5))]
    assert index.scores("CAR").tolist() == pytest.approx([*wanted, 0])


def test_evaluation_groups_have_all_rows_and_no_text_twice() -> None:
    assert distinct_groups([()] * 5, 2) == [[0, 1], [2, 3], [4]]
    assert distinct_groups([(1, 9), (1, 8), (2, 9), (3, 7), (1, 6), (4, 5)], 2) == [[0, 3], [1, 2], [4, 5]]


def test_evaluation_groups_of_two_documents_take_linear_time() -> None:
    assert len(distinct_groups([(number, -1 - number % 2) for number in range(40_000)], 64)) == 20_000
