"""Intervals of the difference of two runs on the rows that both evaluated."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.run_case import write_run
from tunekit.artifacts.report.compare import comparison_report
from tunekit.artifacts.report.html import html_page
from tunekit.artifacts.report.paired import differences, paired_interval
from tunekit.artifacts.report.values import read_run


def test_the_interval_is_that_of_every_possible_resample() -> None:
    """Of five rows all 5^5 draws can be written down."""
    one, other = np.array([3.0, 1.0, 4.0, 1.5, 9.0]), np.array([2.0, 1.2, 3.0, 1.0, 9.5])
    units = np.array([2.0, 1.0, 3.0, 1.0, 6.0])
    draws = np.array(list(product(range(5), repeat=5)))  # (3125, 5)
    exact = (other - one)[draws].sum(axis=1) / units[draws].sum(axis=1)
    assert paired_interval(one, other, units) == pytest.approx(np.quantile(exact, [0.025, 0.975]), abs=0.03)


def test_of_many_rows_it_is_the_normal_distributions() -> None:
    generator = np.random.default_rng(1)
    one = generator.normal(5.0, 3.0, 4000)
    other = one - generator.normal(0.1, 1.0, 4000)
    low, high = paired_interval(one, other, np.ones(4000))
    middle, reach = (other - one).mean(), 1.96 * (other - one).std() / 4000**0.5
    assert (low, high) == pytest.approx((middle - reach, middle + reach), abs=0.1 * reach)
    unpaired = 1.96 * (one.var() + other.var()) ** 0.5 / 4000**0.5
    assert high - low < unpaired  # what the pairs are for


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
    columns = {"digests": names, "losses": moved, "units": kept["units"]}
    better = change(write_run(tmp_path / "better"), **{name: values[::-1] for name, values in columns.items()})
    runs = [read_run(folder) for folder in (plain, better)]
    (found,) = differences(runs)
    assert (found.run, found.than, found.rows) == ("better", "plain", 19)
    assert found.difference == pytest.approx(-0.1)
    assert (found.low, found.high) == pytest.approx((-0.1, -0.1))
    assert "Better, or by chance?" in html_page(comparison_report(runs))


def test_what_cannot_be_compared_is_not(tmp_path: Path) -> None:
    """Rows of other weights than the exported ones; a loss of another objective; no rows in common."""
    plain = write_run(tmp_path / "plain")
    older = change(write_run(tmp_path / "older"), step=20)
    apart = change(write_run(tmp_path / "apart"), digests=[f"x{at}" for at in range(30)])
    other = write_run(tmp_path / "other")
    plan = json.loads((other / "plan.json").read_text("utf-8"))
    plan["recipe"]["objective"] = {"method": "dpo", "beta": 0.2}
    (other / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    assert differences([read_run(folder) for folder in (plain, older, apart, other)]) == []
    assert "highest loss" not in html_page(comparison_report([read_run(plain), read_run(older)]))
