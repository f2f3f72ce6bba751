"""Ranks, nearest rows and lists, on rows whose faults are known."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tunekit.contracts import Batch, Row
from tunekit.evaluation.row_listing import Ranking
from tunekit.evaluation.row_ranking import (
    AGAINST,
    DUPLICATES,
    NOTHING,
    WRONG,
    Neighbours,
    RowFacts,
    contradicted,
    earlier,
    leave_out,
    nearest,
    rank_correlation,
    ranks,
    row_lists,
)
from tunekit.evaluation.row_states import row_means


def test_equal_values_share_their_mean_rank() -> None:
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [0.625, 0.0, 0.625, 0.25]
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([9.0, 7, 5])) == pytest.approx(-1)
    assert rank_correlation(np.ones(3), np.array([9.0, 7, 5])) == 0


def test_nearest_rows_equal_a_plain_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunekit.evaluation.row_ranking.BLOCK_ROWS", 7)
    vectors = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    moved = vectors - vectors.mean(axis=0)
    cosines = np.corrcoef(np.hstack([moved, -moved]))  # of (v, -v), whose mean is 0: the plain cosine
    np.fill_diagonal(cosines, -2)
    near = nearest(vectors, 4)
    assert near.rows.tolist() == np.argsort(-cosines, axis=1)[:, :4].tolist()
    assert np.allclose(near.similarity, -np.sort(-cosines, axis=1)[:, :4], atol=1e-5)
    assert nearest(vectors[:1]).rows.shape == (1, 0)


def facts_of(labels: list[str], vectors: np.ndarray, losses: np.ndarray) -> RowFacts:
    near = nearest(vectors, 3)
    disagreement = contradicted(losses[0], near, labels)
    return RowFacts(np.ones(len(labels)), losses, -losses + 1, 0, disagreement, near, labels)


@pytest.fixture
def facts() -> RowFacts:
    """Two groups of six similar rows. Row 3 has the label of the other group and a high loss; row 8 equals row 7; row
    11 was known before training."""
    draw = np.random.default_rng(1)
    centres = np.repeat(8 * np.eye(2, 64), 6, axis=0)
    vectors = (centres + draw.normal(size=(12, 64))).astype(np.float32)
    vectors[8] = vectors[7]
    losses = np.full((2, 12), 0.5) + draw.uniform(0, 0.1, size=(2, 12))
    losses[:, 3], losses[:, 11] = 3.0, 0.01
    labels = ["a"] * 6 + ["b"] * 6
    labels[3] = "b"
    facts = facts_of(labels, vectors, losses)
    return replace(facts, before=np.where(np.arange(12) == 11, 0.02, 1.0))


def test_planted_rows_are_in_their_lists(facts: RowFacts) -> None:
    lists = {name: numbers.tolist() for name, numbers in row_lists(facts).items()}
    assert lists == {WRONG: [3], NOTHING: [11], DUPLICATES: [8]}
    influence = np.where(np.arange(12) == 5, -1.0, np.where(np.arange(12) == 2, -2.0, 1.0))
    assert row_lists(replace(facts, influence=influence))[AGAINST].tolist() == [2, 5]


def test_the_mean_of_hidden_states_is_over_the_answer_of_an_encoder_decoder() -> None:
    """And not over padding, or the positions of the encoder's mask."""
    hidden = torch.arange(12.0).view(2, 3, 2)
    rows = [Row({}, sizes, sizes[-1], "a") for sizes in ((2, 3), (3, 1))]
    inputs = {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]), "decoder_input_ids": torch.zeros(2, 3)}
    both = row_means(hidden, Batch(inputs, {}, tuple((row,) for row in rows)))
    assert both is not None
    assert both.tolist() == [[2.0, 3.0], [6.0, 7.0]]


def test_the_mean_of_hidden_states_is_over_all_lines_of_a_row() -> None:
    """Both answers of a pair: first the chosen one of each row. Noisy images: those of one row together."""
    hidden = torch.tensor([1.0, 2.0, 3.0, 8.0]).view(4, 1, 1)
    rows = [Row({}, (1, 1), 1, "a")] * 2
    sequences = tuple((row,) for row in rows)
    for targets, expected in (({}, [[2.0], [5.0]]), ({"of_row": torch.tensor([0, 0, 1, 1])}, [[1.5], [5.5]])):
        means = row_means(hidden, Batch({}, targets, sequences))
        assert means is not None
        assert means.tolist() == expected


def test_the_reason_of_a_duplicate_is_the_earlier_row(facts: RowFacts) -> None:
    """Also if a later row is more similar."""
    near = Neighbours(np.array([[2, 0], [0, 2], [1, 0]]), np.array([[0.99, 0.96], [0.96, 0.95], [0.98, 0.97]]))
    cut = {"before": facts.before[:3], "losses": facts.losses[:, :3], "margins": facts.margins[:, :3]}
    three = replace(facts, **cut, disagreement=facts.disagreement[:3], near=near, labels=["a", "b", "a"])
    assert row_lists(three)[DUPLICATES].tolist() == [2]
    ranking: Any = SimpleNamespace(facts=three, earlier=earlier(three), places=["a:1", "a:2", "a:5"])
    assert Ranking.why(ranking, 2, DUPLICATES) == "similarity 0.970 to a:1"


def test_equal_losses_before_training_say_nothing_about_a_row(facts: RowFacts) -> None:
    """As in DPO, where the model at step 0 is the reference."""
    before = np.full(12, 0.6931472) + np.where(np.arange(12) == 4, 6e-8, 0)
    assert NOTHING not in row_lists(replace(facts, before=before))


def test_without_classes_a_tenth_of_the_rows_is_listed(facts: RowFacts) -> None:
    plain = replace(facts, labels=(), margins=np.full((2, 12), -1.0))
    assert row_lists(plain)[WRONG].tolist() == [3]


def test_rows_of_the_lists_are_left_out_first(facts: RowFacts) -> None:
    ordered = leave_out(facts, row_lists(facts)).tolist()
    assert ordered[:3] == [3, 8, 11]
    assert sorted(ordered) == list(range(12))


def test_a_loss_that_all_rows_of_a_class_share_is_no_fault(facts: RowFacts) -> None:
    losses = facts.losses.copy()
    losses[:, [0, 1, 2, 4, 5]] += 2.8  # those of the label a
    assert int(replace(facts, losses=losses).wrongness().argmax()) == 3
    assert int(replace(facts, losses=losses, labels=(), disagreement=np.zeros(0)).wrongness().argmax()) != 3


def test_without_classes_a_row_is_compared_with_the_losses_of_similar_rows(facts: RowFacts) -> None:
    values = contradicted(facts.losses[0], facts.near, ())
    assert int(values.argmax()) == 3
    assert values[3] == pytest.approx(3.0 - facts.losses[0][facts.near.rows[3]].mean())
