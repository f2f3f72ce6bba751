"""Intervals of the difference of two runs on the rows that both evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from tests.support.run_case import write_run
from tunekit.artifacts.report.compare import comparison_report
from tunekit.artifacts.report.html import html_page
from tunekit.artifacts.report.paired import (
    difference_interval,
    differences,
    ratio_error,
    rows_for_skewness,
    rows_needed,
    who_won,
)
from tunekit.artifacts.report.values import read_run
from tunekit.basics import NORMAL_95
from tunekit.recipe.reading.names import known_names, objective_class


def test_the_constant_is_the_quantile_of_the_normal_distribution() -> None:
    assert pytest.approx(NormalDist().inv_cdf(0.975), abs=1e-6) == NORMAL_95


def test_few_rows_that_differ_by_the_same_amount_show_no_difference() -> None:
    """A metric of 0 or 1 changes by 1 in each of them; the interval had the width 0."""
    for rows, shows in ((2, False), (5, False), (6, True), (30, True)):
        low, high = difference_interval(np.zeros(rows), np.ones(rows), np.ones(rows))
        assert low < 1 < high
        assert (low > 0) == shows
    units = np.array([1.0, 3.0, 7.0])
    low, high = difference_interval(0.1 * units, 0.4 * units, units)  # the same difference for each unit
    assert low < 0 < high
    assert difference_interval(units, units, units) == (0.0, 0.0)  # nothing changed


@pytest.mark.parametrize("rows", [2, 3, 5, 8])
def test_few_rows_of_equal_models_rarely_show_a_difference(rows: int) -> None:
    generator = np.random.default_rng(rows)
    draws = generator.normal(size=(400, rows))
    ends = [difference_interval(np.zeros(rows), draw, np.ones(rows)) for draw in draws]
    assert np.mean([low > 0 or high < 0 for low, high in ends]) < 0.1


Shape = Callable[[np.random.Generator, tuple[int, int]], Any]
SHAPES: dict[str, Shape] = {  # of the differences of two equal models: their mean is 0
    "normal": lambda draw, size: draw.normal(size=size),
    "uniform": lambda draw, size: draw.uniform(-1, 1, size),
    "laplace": lambda draw, size: draw.laplace(size=size),
    "heavy tails": lambda draw, size: draw.standard_t(3, size),
    "a tenth is ten times as large": lambda draw, size: (
        draw.normal(size=size) * np.where(draw.random(size) < 0.1, 10, 1)
    ),
    "exponential": lambda draw, size: draw.exponential(size=size) - 1,
    "one-sided skew": lambda draw, size: np.exp(draw.normal(size=size)) - np.exp(0.5),
    "extreme skew": lambda draw, size: np.exp(2 * draw.normal(size=size)) - np.exp(2),
}


def clear_share(shape: str, rows: int, comparisons: int) -> float:
    """The share of comparisons of equal models that are called clear."""
    draws = SHAPES[shape](np.random.default_rng(7), (comparisons, rows))
    same, units, clear = np.zeros(rows), np.ones(rows), 0
    for other in draws:
        low, high = difference_interval(same, other, units)
        clear += (low > 0 or high < 0) and rows_for_skewness(other, units) is None
    return clear / comparisons


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [30, 200])
def test_equal_models_are_rarely_called_different(shape: str, rows: int) -> None:
    """With one-sided skew and 30 rows, the interval alone would call 12 % clear, with extreme skew 34 %."""
    assert clear_share(shape, rows, 2000) <= 0.07


def test_rows_with_a_long_tail_on_one_side_are_too_few(tmp_path: Path) -> None:
    plain = write_run(tmp_path / "plain")
    kept = json.loads((plain / "evaluation_rows.json").read_text("utf-8"))
    far = [loss - (8.0 if at in (4, 9, 17) else 1.0) * kept["units"][at] for at, loss in enumerate(kept["losses"])]
    runs = [read_run(plain), read_run(change(write_run(tmp_path / "other"), losses=far))]
    (found,) = differences(runs)
    assert found.high < 0
    assert found.too_few
    assert (found.lower, found.tone) == (False, "neutral")
    (sentence,) = who_won(runs, [found])
    assert sentence.startswith("too few rows to distinguish other and plain: ")
    assert sentence.endswith(f"differ much more than the others, so {found.needed_rows:,} are needed")
    assert found.texts()[-1] == "too few rows"


def test_of_many_rows_it_is_the_normal_distributions() -> None:
    generator = np.random.default_rng(1)
    one = generator.normal(5.0, 3.0, 4000)
    other = one - generator.normal(0.1, 1.0, 4000)
    low, high = difference_interval(one, other, np.ones(4000))
    middle, reach = (other - one).mean(), 1.96 * (other - one).std() / 4000**0.5
    assert (low, high) == pytest.approx((middle - reach, middle + reach), abs=0.1 * reach)
    unpaired = 1.96 * (one.var() + other.var()) ** 0.5 / 4000**0.5
    assert high - low < unpaired  # what the pairs are for


def test_that_many_rows_show_the_difference_in_four_of_five_draws() -> None:
    """The power of the test with `rows_needed` rows, counted over draws."""
    generator = np.random.default_rng(2)
    one = generator.normal(5.0, 3.0, 50)
    other = one + generator.permutation(np.repeat([0.9, -0.7], 25))  # by 0.1 on average, with deviation 0.8
    needed = rows_needed(one, other, np.ones(50))
    assert needed == pytest.approx((2.8 * 0.8 / 0.1) ** 2, rel=0.03)
    shown, draws = 0, 500
    for _ in range(draws):
        drawn = (other - one)[generator.integers(0, 50, needed)]
        shown += abs(drawn.mean()) > 1.96 * ratio_error(drawn, np.ones(len(drawn)))
    assert 0.74 < shown / draws < 0.86
    for start in (2, 5):  # with few rows, t is much larger than 1.96
        few = np.linspace(-1.0, 1.0, start)
        few = few / few.std(ddof=1) + 1.2
        needed = rows_needed(np.zeros(start), few, np.ones(start))
        assert needed is not None
        drawn = generator.normal(1.2, 1.0, (400, needed))
        ends = [difference_interval(np.zeros(needed), rows, np.ones(needed)) for rows in drawn]
        assert np.mean([low > 0 for low, _ in ends]) > 0.74  # 0.65 without t, or no number for 2 rows
    assert rows_needed(one, one, np.ones(50)) is None  # no difference
    with np.errstate(over="ignore"):
        for damaged in ([1e200, -1e200, 1e199], [1e150, -1e150, 1e-10], [1e60, -1e60, 1e-5]):
            assert rows_needed(np.zeros(3), np.array(damaged), np.ones(3)) is None
    assert rows_needed(one, one + 0.1, np.ones(50)) is None  # the same difference on each row


def test_the_error_of_a_loss_over_units_is_that_of_a_resample() -> None:
    generator = np.random.default_rng(3)
    units = generator.integers(1, 9, 200).astype(float)
    sums = units * generator.normal(2.0, 0.5, 200)
    rows = generator.integers(0, 200, (2000, 200))
    resampled = sums[rows].sum(axis=1) / units[rows].sum(axis=1)
    assert ratio_error(sums, units) == pytest.approx(resampled.std(), rel=0.1)


def change(folder: Path, **columns: Any) -> Path:
    file = folder / "evaluation_rows.json"
    kept = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(kept | columns), encoding="utf-8")
    return folder


def test_runs_are_compared_on_the_rows_that_they_share(tmp_path: Path) -> None:
    """Whatever their order; equal rows one with one; a loss that was not finite not at all."""
    plain = write_run(tmp_path / "plain")
    kept = json.loads((plain / "evaluation_rows.json").read_text("utf-8"))
    names, losses = [*kept["digests"][:20], *(f"other {at}" for at in range(10))], kept["losses"]
    moved = [None if at == 3 else loss - 0.1 * kept["units"][at] for at, loss in enumerate(losses)]
    columns = {"digests": names, "losses": moved, "units": kept["units"], "before": kept["before"]}
    better = change(write_run(tmp_path / "better"), **{name: values[::-1] for name, values in columns.items()})
    runs = [read_run(folder) for folder in (plain, better)]
    (found,) = differences(runs)
    assert (found.run, found.than, found.rows) == ("better", "plain", 19)
    assert found.difference == pytest.approx(-0.1)
    reach = 0.2 * (1 - 0.025 ** (1 / 19))  # all of them differ by the same amount
    assert (found.low, found.high) == pytest.approx((-0.1 - reach, -0.1 + reach))
    assert "Better, or by chance?" in html_page(comparison_report(runs))
    (sentence,) = who_won(runs, [found])
    assert sentence.startswith(f"better is better than plain: evaluation loss {found.value:.4g} against ")
    assert "2.6 before training (95 % interval of the difference -0.1353 to -0.06471 on 19 rows)" in sentence
    assert '<p class="verdict good">better is better' in html_page(comparison_report(runs))
    assert '<p class="verdict bad">plain is worse' in html_page(comparison_report(runs[::-1]))
    noisy = [loss + (0.5 if at % 2 else -0.6) * kept["units"][at] for at, loss in enumerate(losses)]
    unclear = read_run(change(write_run(tmp_path / "unclear"), losses=noisy))
    (found,) = differences([runs[0], unclear])
    assert found.needed_rows is not None
    assert found.needed_rows > 30
    (sentence,) = who_won([runs[0], unclear], [found])
    assert sentence.startswith("unclear and plain cannot be distinguished: ")
    assert sentence.endswith(f"; about {found.needed_rows:,} rows would show such a difference")
    shown = f'<p class="verdict neutral">{sentence}.</p>'  # names are not capitalised
    assert shown in html_page(comparison_report([runs[0], unclear]))


@pytest.mark.parametrize(
    ("objective", "change", "compared"),
    [
        ({"method": "classify", "class_weights": None}, {"class_weights": "balanced"}, 1),
        ({"method": "classify"}, {"label_smoothing": 0.1}, 1),
        ({"method": "distill", "teacher_streaming": "off"}, {"teacher_streaming": "host"}, 1),
        ({"method": "audio_classify"}, {"apply_spec_augment": True, "label_smoothing": 0.1}, 1),
        ({"method": "dpo"}, {"precompute_ref_log_probs": True}, 1),
        ({"method": "kto"}, {"precompute_ref_log_probs": True}, 1),
        ({"method": "dpo", "label_smoothing": 0.0}, {"label_smoothing": 0.1}, 0),
        ({"method": "dpo", "beta": 0.1}, {"beta": 0.2}, 0),
        ({"method": "classify"}, {"problem_type": "regression"}, 0),
        ({"method": "dpo"}, {"beta": 0.1}, 1),  # an earlier version's run lacks a key, which has its default
        ({"method": "dpo"}, {"beta": 0.2}, 0),
    ],
)
def test_only_settings_that_an_evaluation_reads_must_be_equal(
    objective: dict[str, Any], change: dict[str, Any], compared: int, tmp_path: Path
) -> None:
    runs = []
    for name, settings in (("one", objective), ("other", objective | change)):
        folder = write_run(tmp_path / name)
        plan = json.loads((folder / "plan.json").read_text("utf-8"))
        plan["recipe"]["objective"] = settings
        (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        runs.append(read_run(folder))
    assert len(differences(runs)) == compared


@pytest.mark.parametrize("other", [("other", "none"), ("one", "nf4")])
@pytest.mark.parametrize(("method", "compared"), [("dpo", 0), ("kto", 0), ("orpo", 1), ("sft", 1)])
def test_a_loss_relative_to_the_base_is_not_compared_with_that_of_another_base(
    method: str, compared: int, other: tuple[str, str], tmp_path: Path
) -> None:
    runs = []
    for name, (base, quantization) in (("run", ("one", "none")), ("another", other)):
        folder = write_run(tmp_path / name)
        plan = json.loads((folder / "plan.json").read_text("utf-8"))
        plan["recipe"]["objective"] = {"method": method}
        plan["recipe"]["model"]["quantization"] = quantization
        (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        (folder / "environment.json").write_text(json.dumps({"fingerprint": {"base": base}}), encoding="utf-8")
        runs.append(read_run(folder))
    assert len(differences(runs)) == compared


def test_keys_of_training_are_settings_of_their_objective() -> None:
    for name in known_names("objectives"):
        settings = objective_class(name)
        assert set(settings.training_keys) <= set(settings.model_fields)
    assert objective_class("image_classify").training_keys[:2] == ("class_weights", "label_smoothing")


def test_copies_of_a_row_are_one_row(tmp_path: Path) -> None:
    """They vary together. Counted as many rows, five copies of each would show a difference of equal models in 37 % of
    the draws."""
    runs = {}
    for copies in (1, 5):
        folders = [write_run(tmp_path / f"{name} {copies}", seed=seed) for seed, name in enumerate(("one", "other"))]
        for folder in folders:
            kept = json.loads((folder / "evaluation_rows.json").read_text("utf-8"))
            change(folder, **{name: kept[name] * copies for name in ("rows", "digests", "units", "losses", "before")})
        (runs[copies],) = differences([read_run(folder) for folder in folders])
    assert runs[5].rows == runs[1].rows == 30
    assert (runs[5].low, runs[5].high) == pytest.approx((runs[1].low, runs[1].high))


def test_the_loss_before_training_is_that_of_both_runs(tmp_path: Path) -> None:
    plain, other = write_run(tmp_path / "plain"), write_run(tmp_path / "other")
    kept = json.loads((plain / "evaluation_rows.json").read_text("utf-8"))
    runs = [read_run(plain), read_run(other)]
    assert "2.6 before training" in who_won(runs, differences(runs))[0]
    change(other, before=[loss * 2 for loss in kept["before"]])  # a different base
    runs = [read_run(plain), read_run(other)]
    assert "before training" not in who_won(runs, differences(runs))[0]


def test_what_cannot_be_compared_is_not(tmp_path: Path) -> None:
    """Rows of other weights than the exported ones; a loss of another objective; no rows in common."""
    plain = write_run(tmp_path / "plain")
    older = change(write_run(tmp_path / "older"), step=20)
    apart = change(write_run(tmp_path / "apart"), digests=[f"x{at}" for at in range(30)])
    other = write_run(tmp_path / "other")
    plan = json.loads((other / "plan.json").read_text("utf-8"))
    plan["recipe"]["objective"] = {"method": "dpo", "beta": 0.2}
    (other / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    runs = [read_run(folder) for folder in (plain, older, apart, other)]
    assert differences(runs) == []
    why = "they have fewer than two evaluation rows in common, or different objectives or reference models"
    assert who_won(runs, []) == [f"the runs cannot be compared: {why}"]
    runs[2:] = [change(write_run(tmp_path / "noisy", seed=1), step=40), runs[3].path]
    runs[2:] = map(read_run, runs[2:])
    _, compared, last = who_won(runs, differences(runs))
    assert compared.startswith("noisy is worse than plain: ")
    assert last == f"other cannot be compared with plain: {why}"
    page = html_page(comparison_report([read_run(plain), read_run(older)]))
    assert "highest loss" not in page
    assert '<p class="verdict neutral">the runs cannot be compared' in page
