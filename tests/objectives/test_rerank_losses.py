"""Every loss of rerankers and its gradient equal those of sentence_transformers, where it is installed; the metrics of
reranking equal its evaluator's to the last digit."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tunekit.objectives.losses.query_metrics import ranking_metrics
from tunekit.objectives.losses.ranking import LOSSES, query_losses, units_of
from tunekit.recipe.objectives.rerank import RerankSettings

HAS_ORACLE = importlib.util.find_spec("sentence_transformers") is not None
needs_oracle = pytest.mark.skipif(not HAS_ORACLE, reason="sentence_transformers is not installed")
RAGGED = (5, 2, 7, 3)
PAIRS = ("binary_cross_entropy", "mse")
LISTS = ("lambda", "ranknet", "listnet", "plistmle")
EQUAL = ("multiple_negatives_ranking", "margin_mse")  # rows with equal numbers of documents
CASES: dict[str, tuple[int, ...]] = {"ragged": RAGGED, "one row": (6,), "ties": RAGGED}


def settings_of(loss: str, **values: Any) -> RerankSettings:
    return RerankSettings.model_validate({"method": "rerank", "loss": loss, **values})


def scores_and_labels(loss: str, case: str, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Random scores and graded labels; with ties, both have equal values in a row."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(sum(counts), generator=generator)
    labels = torch.randint(0, 4, (sum(counts),), generator=generator).float()
    if loss == "binary_cross_entropy":
        labels = labels / 3
    elif loss in ("mse", "margin_mse"):
        labels = torch.randn(sum(counts), generator=generator)
    if case == "ties":
        scores = (scores * 2).round() / 2
    return scores, labels


def gradient_of(loss: Any, scores: Tensor) -> tuple[Tensor, Tensor]:
    leaf = scores.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def scorer(scores: Tensor) -> Any:
    """A stand-in for a CrossEncoder, whose losses check its type. Its pairs are (query, index of the score)."""
    from sentence_transformers import CrossEncoder

    class Scorer(CrossEncoder):
        num_labels = 1
        device = torch.device("cpu")

        def __init__(self) -> None:
            nn.Module.__init__(self)

        def preprocess(self, pairs: list[tuple[str, str]], **others: object) -> dict[str, Tensor]:
            return {"places": torch.tensor([int(text) for _, text in pairs])}

        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"scores": scores[features["places"]][:, None]}

    return Scorer()


def theirs(settings: RerankSettings, scores: Tensor, labels: Tensor, counts: tuple[int, ...]) -> Tensor:
    from sentence_transformers.cross_encoder import losses as st

    model = scorer(scores)
    places = [part.tolist() for part in torch.arange(len(scores)).split(list(counts))]
    queries, of_rows = [f"q{number}" for number in range(len(counts))], list(labels.split(list(counts)))
    if settings.loss in PAIRS:
        pairs = [[query for query, some in zip(queries, places, strict=True) for _ in some]]
        pairs.append([str(place) for some in places for place in some])
        weight = None if settings.pos_weight is None else torch.tensor(settings.pos_weight)
        loss = st.MSELoss(model) if settings.loss == "mse" else st.BinaryCrossEntropyLoss(model, pos_weight=weight)
        return loss(pairs, labels)
    if settings.loss == "margin_mse":
        columns = [[str(place) for place in column] for column in zip(*places, strict=True)]
        return st.MarginMSELoss(model)([queries, *columns], torch.stack(of_rows))
    if settings.loss == "multiple_negatives_ranking":
        return st.MultipleNegativesRankingLoss(model).calculate_loss(list(scores.view(len(counts), -1).T), len(counts))
    made = {
        "lambda": lambda: st.LambdaLoss(model),
        "ranknet": lambda: st.RankNetLoss(model),
        "listnet": lambda: st.ListNetLoss(model),
        "plistmle": lambda: st.PListMLELoss(model, respect_input_order=False),
    }[settings.loss]()
    return made([queries, [[str(place) for place in some] for some in places]], of_rows)


@needs_oracle
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_and_its_gradient_equal_those_of_sentence_transformers(loss: str, case: str) -> None:
    counts = CASES[case] if loss not in EQUAL else (4,) * len(CASES[case])
    scores, labels = scores_and_labels(loss, case, counts)
    settings = settings_of(loss, **({"pos_weight": 3.0} if loss == "binary_cross_entropy" else {}))
    units = sum(units_of(loss, some.tolist()) for some in labels.split(list(counts)))
    value, gradient = gradient_of(lambda leaf: query_losses(settings, leaf, labels, counts).sum() / units, scores)
    wanted, wanted_gradient = gradient_of(lambda leaf: theirs(settings, leaf, labels, counts), scores)
    torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-6, atol=1e-7)


@needs_oracle
def test_long_lists_keep_finite_weights() -> None:
    counts = (200, 3)
    scores, _ = scores_and_labels("plistmle", "ragged", counts)
    labels = torch.randn(sum(counts), generator=torch.Generator().manual_seed(2))  # their order of ties is not stable
    settings = settings_of("plistmle")
    value = query_losses(settings, scores, labels, counts).mean()
    torch.testing.assert_close(value, theirs(settings, scores, labels, counts), rtol=1e-6, atol=1e-7)


def test_losses_of_small_rows_by_hand() -> None:
    scores, labels = torch.tensor([0.5, -1.0]), torch.tensor([1.0, 0.0])
    sigmoid = 1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(1.0))
    wanted = {
        "binary_cross_entropy": -math.log(sigmoid[0]) - math.log(1 - sigmoid[1]),
        "multiple_negatives_ranking": math.log(1 + math.exp(10 * (sigmoid[1] - sigmoid[0]))),
        "ranknet": math.log2(1 + math.exp(-1.5)),
        "mse": 0.25 + 1.0,
        "margin_mse": 0.25,
        "plistmle": math.log(1 + math.exp(-1.5)),
    }
    for loss, value in wanted.items():
        assert query_losses(settings_of(loss), scores, labels, (2,)).item() == pytest.approx(value, rel=1e-5)
    assert [units_of(loss, [3.0, 0.0, 0.0, 1.0]) for loss in ("ranknet", "listnet", "mse", "margin_mse")] == [
        5,
        1,
        4,
        3,
    ]


class Predicting:
    """A stand-in for a CrossEncoder with given scores."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = np.array(scores, np.float32)
        self.model_card_data: Any = type("Card", (), {"set_evaluation_metrics": lambda *_: None})()

    def predict(self, pairs: list[object], **others: object) -> Any:
        return self.scores[: len(pairs)]


@needs_oracle
@pytest.mark.parametrize("documents", [1, 2, 7, 30])
def test_the_metrics_of_a_query_equal_the_evaluators(documents: int) -> None:
    from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator

    for seed in range(20):
        random = np.random.default_rng(seed)
        scores = random.normal(size=documents).round(1 if seed % 2 else 7).astype(np.float32).tolist()  # with ties
        positives = int(random.integers(1, documents + 1))
        sample = {"query": "q", "positive": [f"p{n}" for n in range(positives)]}
        sample["negative"] = [f"n{n}" for n in range(documents - positives)]
        evaluator = CrossEncoderRerankingEvaluator([sample], write_csv=False)
        found = evaluator(Predicting(scores))
        relevant = [1.0] * positives + [0.0] * (documents - positives)
        assert ranking_metrics(relevant, scores) == [found["ndcg@10"], found["mrr@10"], found["map"]]
