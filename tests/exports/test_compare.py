"""The figures of a certificate, from made-up log-probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tunekit.errors import NumericsError
from tunekit.exports.compare import difference
from tunekit.exports.programs.answer import NextTokens, full_answer

ROW = [0, 2, 1]
TORCH = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1], [0.4, 0.3, 0.3]]))
PROGRAM = np.log(np.array([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1], [0.3, 0.4, 0.3]], np.float32))


def test_all_log_probabilities() -> None:
    result = difference([ROW], [TORCH], [full_answer(PROGRAM, ROW)])
    assert result.largest == pytest.approx(math.log(4 / 3))
    assert result.mean == pytest.approx(2 * math.log(4 / 3) / 9)
    assert result.perplexity == pytest.approx((0.25 * 0.7) ** -0.5)
    assert result.torch_perplexity == pytest.approx((0.25 * 0.7) ** -0.5)
    assert (result.greedy_differences, result.tokens) == (1, 3)


def test_largest_log_probabilities() -> None:
    """The program gives the two most probable tokens, and the token that follows where it is not one of them."""
    tokens = np.array([[0, 1], [1, 0], [1, 0]])
    values = np.log(np.array([[0.5, 0.25], [0.7, 0.2], [0.4, 0.3]], np.float32))
    result = difference([ROW], [TORCH], [NextTokens(values, tokens, np.log(np.array([0.2, 0.7], np.float32)))])
    assert result.largest == pytest.approx(math.log(4 / 3))
    assert result.mean == pytest.approx(2 * math.log(4 / 3) / 6)
    assert result.perplexity == pytest.approx((0.2 * 0.7) ** -0.5)
    assert result.torch_perplexity == pytest.approx((0.25 * 0.7) ** -0.5)
    assert result.greedy_differences == 1


def test_rows_count_by_their_tokens() -> None:
    """A row of three tokens and one of two: the means are over tokens, not over rows."""
    second = [1, 0]
    answers = [full_answer(PROGRAM, ROW), full_answer(PROGRAM[:2], second)]
    result = difference([ROW, second], [TORCH, TORCH[:2]], answers)
    assert result.mean == pytest.approx(2 * math.log(4 / 3) / 15)
    assert result.perplexity == pytest.approx((0.25 * 0.7 * 0.5) ** (-1 / 3))
    assert result.tokens == 5


def test_values_that_are_not_finite() -> None:
    broken = PROGRAM.copy()
    broken[1, 2] = np.nan
    with pytest.raises(NumericsError, match="not finite"):
        difference([ROW], [TORCH], [full_answer(broken, ROW)])
    broken = PROGRAM.copy()
    broken[2, 2] = np.nan  # the last position of the second row
    with pytest.raises(NumericsError, match="not finite"):
        difference([ROW, ROW], [TORCH, TORCH], [full_answer(PROGRAM, ROW), full_answer(broken, ROW)])


def test_vocabulary_of_a_different_size() -> None:
    with pytest.raises(NumericsError, match="2 tokens, and torch's has 3"):
        difference([ROW[:1]], [TORCH[:1]], [full_answer(PROGRAM[:1, :2], ROW[:1])])
