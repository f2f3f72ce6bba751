"""The margins of rows, against plain formulas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from tunekit.contracts import ROW_MARGINS
from tunekit.objectives.losses.row_sums import label_margins, log_odds, margin_sums


def test_margins_of_labels_and_tokens() -> None:
    scores, labels = torch.tensor([[3.0, 1, 2], [0, 4, 9]]), torch.tensor([0, 1])
    assert label_margins(scores, labels).tolist() == [1, -5]
    odds = log_odds(-torch.tensor([0.5, 0.9, 1.0]).log())
    assert torch.allclose(odds[:2], torch.tensor([0.0, 9.0]).double().log().clamp(min=0), atol=1e-6)
    assert odds.isfinite().all()


def test_the_margin_of_a_row_is_that_of_its_worst_unit() -> None:
    batch: Any = SimpleNamespace(rows=[SimpleNamespace(supervised=count) for count in (2, 0, 1)])
    assert margin_sums(torch.tensor([4.0, -1.0, 2.0]), batch)[ROW_MARGINS].tolist() == [-1, 0, 2]
