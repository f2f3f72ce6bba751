"""Metrics by hand-computed values."""

from __future__ import annotations

import math

import pytest

from tunekit.evaluation.answers import text_metrics
from tunekit.metrics import (
    cer,
    contains,
    exact_match,
    loss,
    perplexity,
    rouge_l,
    token_accuracy,
    token_f1,
    wer,
    wer_normalized,
)
from tunekit.metrics.outputs import pearson, spearman


def test_exact_match() -> None:
    assert exact_match.score(["a", " b\n", "c"], ["a", "b", "C"]) == pytest.approx(2 / 3)


def test_contains() -> None:
    assert contains.score(["the answer is 7.", "8", "", "x"], ["7", "7", "", ""]) == pytest.approx(2 / 4)


def test_token_f1() -> None:
    assert token_f1.score(["The cat sat"], ["the cat, the dog"]) == pytest.approx(2 * 2 / (3 + 4))
    assert token_f1.score(["", "a", "..."], ["", "", "b"]) == pytest.approx(1 / 3)


def test_rouge_l() -> None:
    assert rouge_l.score(["police kill the gunman"], ["police killed the gunman"]) == pytest.approx(2 * 3 / 8)
    assert rouge_l.score(["the gunman kill police"], ["police killed the gunman"]) == pytest.approx(2 * 2 / 8)
    assert rouge_l.score(["été à Paris"], ["Été à paris"]) == 1.0


def test_words_of_other_scripts_are_whole_words() -> None:
    for metric in (token_f1, rouge_l):
        assert metric.score(["\u0926\u093f\u0928"], ["\u0926\u093e\u0928"]) == 0.0, (
            "two Hindi words of one letter's difference"
        )
        assert metric.score(["\u0926\u093f\u0928"], ["\u0926\u093f\u0928"]) == 1.0
    assert rouge_l.score(["snake_case, it's"], ["snake case it s"]) == 1.0, "as rouge_score splits ASCII"


@pytest.mark.parametrize("metric", [exact_match, contains, token_f1, rouge_l])
def test_no_answers_and_uneven_lists_are_no_scores(metric: object) -> None:
    for predictions, references in (([], []), (["a"], [])):
        with pytest.raises(ValueError):
            metric.score(predictions, references)  # type: ignore[attr-defined]


def test_error_rates_are_of_the_whole_corpus() -> None:
    predictions, references = ["one two", "four", "x y z"], ["one two three", "for", "x"]
    assert wer.score(predictions, references) == pytest.approx((1 + 1 + 2) / 5), "not the mean of 1/3, 1 and 2"
    assert cer.score(["abc", "b"], ["abd", "b"]) == pytest.approx(1 / 4)
    assert wer.score(["noise", "one"], ["  ", "one"]) == 0.0, "a reference without words has no share of errors"
    assert wer.score([""], ["one"]) == 1.0
    with pytest.raises(ValueError, match="no reference has a word"):
        wer.score(["noise"], [""])


def test_a_normalised_rate_sees_normalised_texts() -> None:
    assert text_metrics(["wer", "wer_normalized"], ["Seven."], ["seven"], lambda text: text.lower().strip(".")) == {
        "wer": 1.0,
        "wer_normalized": 0.0,
    }
    assert wer_normalized.NORMALIZED
    found = text_metrics(
        ["wer", "wer_normalized"], ["a", "b"], ["a", "[noise]"], lambda text: text.replace("[noise]", "")
    )
    assert found == {"wer": 0.5, "wer_normalized": 0.0, "wer_normalized_left_out": 1.0}


def test_from_sums() -> None:
    sums = {"loss": 6.0, "correct": 1.0, "units": 4.0}
    assert loss.from_sums(sums) == 1.5
    assert perplexity.from_sums(sums) == pytest.approx(math.exp(1.5))
    assert perplexity.from_sums({"loss": 1e6, "units": 1.0}) == math.inf
    assert token_accuracy.from_sums(sums) == 0.25
    for metric in (loss, perplexity, token_accuracy):
        assert set(metric.NEEDS) <= set(sums)
        with pytest.raises(ValueError):
            metric.from_sums(dict.fromkeys(metric.NEEDS, 0.0))


def test_correlations_with_values_that_are_not_finite() -> None:
    """As in scipy: a model whose scores are NaN has no correlation, and is not the best one."""
    for wrong in (math.nan, math.inf):
        assert math.isnan(pearson([0.1, wrong, 0.3], [1.0, 2.0, 3.0]))
        assert math.isnan(spearman([0.1, wrong, 0.3], [1.0, 2.0, 3.0]))
    assert math.isnan(spearman([math.nan] * 3, [1.0, 2.0, 3.0]))
