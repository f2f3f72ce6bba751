"""Every loss of embeddings and its gradient equal those of sentence_transformers, where it is installed, and plain
formulas in float64."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tunekit.objectives.losses import contrast
from tunekit.objectives.losses.contrast import RowTexts, embedding_loss
from tunekit.recipe.objectives.embed import EmbedSettings

HAS_ORACLE = importlib.util.find_spec("sentence_transformers") is not None
needs_oracle = pytest.mark.skipif(not HAS_ORACLE, reason="sentence_transformers is not installed")
ALL = ["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
RANKING: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 50.0},
    "symmetric": {"directions": ["query_to_doc", "doc_to_query"], "partition": "per_direction"},
    "all directions": {"directions": ALL},
    **{
        mode: {"hardness": {"mode": mode, "strength": 9.0}}
        for mode in ("in_batch_negatives", "hard_negatives", "all_negatives")
    },
    "hard in all directions": {"directions": ALL, "hardness": {"mode": "all_negatives", "strength": 5.0}},
}
OTHERS: dict[str, tuple[dict[str, Any], int]] = {  # settings, and the number of texts of each row
    "cosent": ({}, 2),
    "angle": ({"scale": 7.0}, 2),
    "cosine": ({}, 2),
    "triplet": ({}, 3),
    "contrastive": ({"margin": 0.8}, 2),
    "online_contrastive": ({}, 2),
    "margin_mse": ({}, 4),
    "distill_kl": ({"temperature": 2.0}, 4),
}


def settings_of(loss: str = "multiple_negatives_ranking", **values: Any) -> EmbedSettings:
    return EmbedSettings.model_validate({"method": "embed", "loss": loss, **values})


def embeddings_of(rows: int, texts: int, size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """(rows * texts, size), row after row."""
    numbers = torch.randn(rows * texts, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers.to(dtype)


def scores_of(loss: str, rows: int, texts: int) -> list[tuple[float, ...]]:
    """Numbers with ties; for teachers, one number for each document."""
    if loss in ("contrastive", "online_contrastive"):
        return [(float(row % 3 == 0),) for row in range(rows)]
    if loss in ("cosent", "angle", "cosine"):
        return [((row * 7 % 4) / 4,) for row in range(rows)]
    if loss in ("margin_mse", "distill_kl"):
        return [tuple(math.sin(row + text) for text in range(texts - 1)) for row in range(rows)]
    return [()] * rows


def gradient_of(loss: Any, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    leaf = embeddings.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def theirs(settings: EmbedSettings, rows: RowTexts, texts: int) -> Any:
    """The same loss by sentence_transformers, as a function of the embeddings."""
    from sentence_transformers.sentence_transformer import losses as st

    made: dict[str, Any] = {
        "cosent": lambda: st.CoSENTLoss(None, scale=settings.scale or 20.0),
        "angle": lambda: st.AnglELoss(None, scale=settings.scale or 20.0),
        "cosine": lambda: st.CosineSimilarityLoss(None),
        "triplet": lambda: st.TripletLoss(None),
        "contrastive": lambda: st.ContrastiveLoss(None, margin=settings.margin or 0.5),
        "online_contrastive": lambda: st.OnlineContrastiveLoss(None),
        "margin_mse": lambda: st.MarginMSELoss(None),
        "distill_kl": lambda: st.DistillKLDivLoss(None, temperature=settings.temperature or 1.0),
    }
    hard = settings.hardness
    ranking = {
        "scale": settings.scale or 20.0,
        "directions": settings.directions,
        "partition_mode": settings.partition,
        **({"hardness_mode": hard.mode, "hardness_strength": hard.strength} if hard else {}),
    }
    loss = made[settings.loss]() if settings.loss in made else st.MultipleNegativesRankingLoss(None, **ranking)
    labels = torch.tensor(rows.scores, dtype=torch.float64)
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels

    def value(embeddings: Tensor) -> Tensor:
        columns = [embeddings[place::texts] for place in range(texts)]
        numbers = labels.to(embeddings.dtype if embeddings.dtype != torch.bfloat16 else torch.float32)
        return loss.compute_loss_from_embeddings(columns, numbers)

    return value


def check(settings: EmbedSettings, rows: int, texts: int, dtype: torch.dtype, size: int = 24) -> None:
    group = RowTexts([texts] * rows, scores_of(settings.loss, rows, texts))
    embeddings = embeddings_of(rows, texts, size, dtype)
    ours = gradient_of(lambda leaf: embedding_loss(settings, leaf, group), embeddings)
    oracle = gradient_of(theirs(settings, group, texts), embeddings)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    for mine, other in zip(ours, oracle, strict=True):
        scale = max(float(other.abs().max()), 0.1)  # the gradient of one row may be 0
        assert float((mine.double() - other.double()).abs().max()) <= tolerance * scale


@needs_oracle
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("texts", [2, 4])
@pytest.mark.parametrize("name", RANKING)
def test_ranking_equals_sentence_transformers(name: str, texts: int, dtype: torch.dtype) -> None:
    check(settings_of(**RANKING[name]), 9, texts, dtype)
    if texts > 2 or "hard_negatives" not in name:
        check(settings_of(**RANKING[name]), 1, texts, dtype)


@needs_oracle
@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", OTHERS)
def test_others_equal_sentence_transformers(loss: str, dtype: torch.dtype, rows: int) -> None:
    values, texts = OTHERS[loss]
    check(settings_of(loss, **values), rows, texts, dtype)
    check(settings_of(loss, **values), rows, texts, dtype, size=7)  # an odd size has a padded half


@needs_oracle
def test_bfloat16_embeddings_give_nearly_the_oracles_gradient() -> None:
    check(settings_of(), 8, 3, torch.bfloat16)
    check(settings_of("cosine"), 8, 2, torch.bfloat16)


@needs_oracle
def test_shortened_embeddings_equal_sentence_transformers() -> None:
    from sentence_transformers.sentence_transformer.losses.matryoshka import shrink

    settings, rows = settings_of(matryoshka={24: 1.0, 12: 0.5, 6: 2.0}), RowTexts([3] * 7, [()] * 7)
    embeddings = embeddings_of(7, 3, 24, torch.float64)
    plain = theirs(settings_of(), rows, 3)
    weights = ((24, 1.0), (12, 0.5), (6, 2.0))
    ours = gradient_of(lambda leaf: embedding_loss(settings, leaf, rows), embeddings)
    oracle = gradient_of(lambda leaf: sum(w * plain(shrink(leaf, size)) for size, w in weights), embeddings)
    torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-13)


GUIDED: dict[str, dict[str, Any]] = {
    "plain": {},
    "absolute": {"margin": 0.1, "temperature": 0.05},
    "relative": {"margin": 0.2, "margin_strategy": "relative"},
    "anchor and document only": {"contrast_anchors": False, "contrast_positives": False},
}


@needs_oracle
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("texts", [2, 3])
@pytest.mark.parametrize("name", GUIDED)
def test_guided_ranking_equals_sentence_transformers(
    name: str, texts: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle's models are replaced by functions that return these embeddings."""
    from sentence_transformers.sentence_transformer.losses import gist_embed

    settings = settings_of("gist", guide={"name_or_path": "some-guide"}, **GUIDED[name])
    oracle: Any = torch.nn.Module.__new__(gist_embed.GISTEmbedLoss)
    torch.nn.Module.__init__(oracle)
    facts = {"temperature": settings.temperature or 0.01, "margin": settings.margin or 0.0, "must_retokenize": False}
    names = ("margin_strategy", "contrast_anchors", "contrast_positives")
    facts |= {key: getattr(settings, key) for key in names} | {"gather_across_devices": False, "model": "model"}
    facts |= {"guide": "guide", "similarity_fct": torch.nn.CosineSimilarity(dim=-1)}
    facts |= {"cross_entropy_loss": torch.nn.CrossEntropyLoss()}
    for key, value in facts.items():
        setattr(oracle, key, value)
    guide = embeddings_of(12, texts, 16, dtype, seed=5)
    guide[::texts] += 0.5 * guide[1::texts]  # else nothing is nearer than a positive, or everything
    for rows in (12, 1):
        some, vectors = guide[: rows * texts], embeddings_of(rows, texts, 24, dtype)
        group = RowTexts([texts] * rows, guide=some)

        def theirs(leaf: Tensor, some: Tensor = some) -> Tensor:
            sources = {"model": leaf, "guide": some}
            columns = lambda model, _: [sources[model][place::texts] for place in range(texts)]  # noqa: E731
            monkeypatch.setattr(gist_embed, "embed_columns", columns)
            return oracle([{}], torch.zeros(0))

        ours = gradient_of(lambda leaf, group=group: embedding_loss(settings, leaf, group), vectors)
        # float32: the division by a temperature of 0.01 makes the rounding of a cosine 100 times larger
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}[dtype]
        for mine, other in zip(ours, gradient_of(theirs, vectors), strict=True):
            assert float((mine - other).abs().max()) <= tolerance * max(float(other.abs().max()), 0.1)


def test_a_guide_leaves_out_what_it_finds_nearer_than_the_positive() -> None:
    """Also over blocks of rows, and with rows of different numbers of negatives."""
    counts = [2, 4, 3, 2, 5]
    vectors, guide = embeddings_of(1, 16, 8, torch.float64), embeddings_of(1, 16, 6, torch.float64, seed=3)
    rows = RowTexts(counts, guide=guide)
    settings = settings_of("gist", guide={"name_or_path": "some-guide"}, margin=0.3, temperature=0.5)
    anchors = [0, 2, 6, 9, 11]
    documents = [at for at in range(16) if at not in anchors]
    wanted, left_out = [], 0
    for anchor in anchors:
        limit = cosine(guide[anchor], guide[anchor + 1]) - 0.3
        pairs = [(anchor, other) for other in (*documents, *anchors) if other not in (anchor, anchor + 1)]
        pairs += [(anchor + 1, other + 1) for other in anchors if other != anchor]
        kept = [pair for pair in pairs if cosine(*(guide[at] for at in pair)) <= limit]
        left_out += len(pairs) - len(kept)
        logits = torch.stack([cosine(*(vectors[at] for at in pair)) / 0.5 for pair in [(anchor, anchor + 1), *kept]])
        wanted.append(logits.logsumexp(0) - logits[0])
    assert 20 < left_out < 80
    for block in (256, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(contrast, "BLOCK", block)
            value, _ = gradient_of(lambda leaf: embedding_loss(settings, leaf, rows), vectors)
        torch.testing.assert_close(value, torch.stack(wanted).mean(), rtol=1e-12, atol=0)


def cosine(first: Tensor, second: Tensor) -> Tensor:
    return first @ second / (first.norm() * second.norm())


def test_every_rows_negatives_serve_all_rows_also_if_rows_have_different_numbers_of_them() -> None:
    counts = [2, 4, 3, 2, 5]
    embeddings = embeddings_of(1, sum(counts), 8, torch.float64)
    rows = list(embeddings.split(counts))
    documents = [text for row in rows for text in row[1:]]
    wanted = [
        torch.stack([20 * cosine(row[0], text) for text in documents]).logsumexp(0) - 20 * cosine(row[0], row[1])
        for row in rows
    ]
    loss = embedding_loss(settings_of(), embeddings, RowTexts(counts))
    torch.testing.assert_close(loss, torch.stack(wanted).mean(), rtol=1e-12, atol=0)


def test_cosent_and_angle_are_sums_over_pairs_of_rows() -> None:
    embeddings, scores = embeddings_of(9, 2, 6, torch.float64), scores_of("cosent", 9, 2)
    first, second = embeddings[::2], embeddings[1::2]
    unit_x, unit_y = first / first.norm(dim=1, keepdim=True), second / second.norm(dim=1, keepdim=True)
    cosines = (unit_x * unit_y).sum(dim=1)
    sines = (unit_x[:, 3:] * unit_y[:, :3] - unit_x[:, :3] * unit_y[:, 3:]).sum(dim=1)
    for loss, similarities in (("cosent", cosines), ("angle", (cosines + sines).abs())):
        terms = [
            (20 * (similarities[low] - similarities[high])).exp()
            for low in range(9)
            for high in range(9)
            if scores[low] < scores[high]
        ]
        value = embedding_loss(settings_of(loss), embeddings, RowTexts([2] * 9, scores))
        torch.testing.assert_close(value, torch.stack(terms).sum().log1p(), rtol=1e-12, atol=0)


def test_losses_with_negatives_are_means_over_all_negatives() -> None:
    counts = [3, 4]
    embeddings, scores = embeddings_of(1, 7, 5, torch.float64), [(2.0, 1.0), (1.5, 0.5, 0.0)]
    triples = [(0, 1, 2), (3, 4, 5), (3, 4, 6)]
    distances = [
        (embeddings[a] - embeddings[p]).norm() - (embeddings[a] - embeddings[n]).norm() + 5 for a, p, n in triples
    ]
    value = embedding_loss(settings_of("triplet"), embeddings, RowTexts(counts))
    torch.testing.assert_close(value, torch.stack(distances).relu().mean(), rtol=1e-12, atol=0)
    margins = torch.stack([embeddings[a] @ (embeddings[p] - embeddings[n]) for a, p, n in triples])
    for teacher in (scores, [(1.0,), (1.0, 1.5)]):  # scores, or their differences
        value = embedding_loss(settings_of("margin_mse"), embeddings, RowTexts(counts, teacher))
        wanted = (margins - torch.tensor([1.0, 1.0, 1.5])).square().mean()
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["plain", "all directions", "hard in all directions"])
def test_blocks_of_rows_change_neither_loss_nor_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, rows = settings_of(**RANKING[name]), RowTexts([3] * 11)
    embeddings = embeddings_of(11, 3, 8, torch.float64)
    whole = gradient_of(lambda leaf: embedding_loss(settings, leaf, rows), embeddings)
    monkeypatch.setattr(contrast, "BLOCK", 4)
    blocks = gradient_of(lambda leaf: embedding_loss(settings, leaf, rows), embeddings)
    torch.testing.assert_close(blocks, whole, rtol=1e-12, atol=1e-14)


def test_one_row_without_negatives_has_the_loss_0() -> None:
    value, gradient = gradient_of(
        lambda leaf: embedding_loss(settings_of(), leaf, RowTexts([2])), embeddings_of(1, 2, 8, torch.float64)
    )
    assert float(value) == 0
    assert float(gradient.abs().max()) < 1e-15
