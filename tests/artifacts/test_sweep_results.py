"""The comparison of a sweep's settings: order, spread, intervals over the rows of all seeds, and the verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.run_case import write_run
from tunekit.artifacts.report.html import html_page
from tunekit.artifacts.report.markdown import markdown_page
from tunekit.artifacts.report.paired import paired_interval
from tunekit.artifacts.report.sweep_results import sweep_results
from tunekit.artifacts.report.values import RunValues, read_run

ROWS = 30


def run(folder: Path, loss: float, noise: float = 0.0, seed: int = 0, **more: Any) -> RunValues:
    """A run whose exported weights have this loss; the losses of its rows differ from it by up to `noise`."""
    write_run(folder, seed=seed, **more)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    lines[-1]["eval"]["loss"] = loss
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    rows = json.loads((folder / "evaluation_rows.json").read_text("utf-8"))
    spread = np.random.default_rng(seed + int(1000 * loss)).uniform(-noise, noise, ROWS)
    spread -= np.average(spread, weights=rows["units"])
    rows["losses"] = [units * (loss + part) for units, part in zip(rows["units"], spread, strict=True)]
    (folder / "evaluation_rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return read_run(folder)


def test_clear_and_unclear_differences(tmp_path: Path) -> None:
    losses = {"a": 1.3, "b": 1.0, "c": 1.01}
    results = sweep_results("eval.loss", {name: [run(tmp_path / name, loss, 0.2)] for name, loss in losses.items()})
    assert [setting.name for setting in results.settings] == ["b", "c", "a"]
    assert results.verdict() == "b has the best eval loss, 1; it cannot be distinguished from c on 30 evaluation rows"
    two = sweep_results("eval.loss", {"a": [read_run(tmp_path / "a")], "b": [read_run(tmp_path / "b")]})
    assert two.verdict() == (
        "b has the best eval loss, 1; it is lower than all others on 30 evaluation rows (95% intervals)"
    )
    page = results.page()
    assert page is not None
    for text in (html_page(page), markdown_page(page)):
        assert "cannot be distinguished" in text


def test_a_row_of_several_seeds_is_one_row(tmp_path: Path) -> None:
    """With equal losses in two seeds, the interval is that of one seed: the rows are no more than before."""
    one = {name: [run(tmp_path / name, loss, 0.3)] for name, loss in (("a", 1.0), ("b", 1.1))}
    both = {name: [*runs, read_run(runs[0].path)] for name, runs in one.items()}
    first, second = (sweep_results("eval.loss", runs).settings[1].difference for runs in (one, both))
    assert first is not None
    assert second is not None
    assert (second.low, second.high, second.rows) == pytest.approx((first.low, first.high, ROWS))


def test_the_interval_is_of_the_sums_over_seeds(tmp_path: Path) -> None:
    runs = {
        name: [run(tmp_path / f"{name}{seed}", loss + seed / 10, 0.3, seed) for seed in range(2)]
        for name, loss in (("a", 1.0), ("b", 1.1))
    }
    results = sweep_results("eval.loss", runs)
    assert results.settings[0].mean == pytest.approx(1.05)
    assert results.settings[0].spread == pytest.approx(0.1 / 2**0.5)
    sums = {name: sum(np.array(each.row_losses["losses"]) for each in members) for name, members in runs.items()}
    units = 2.0 * np.array(runs["a"][0].row_losses["units"])
    difference = results.settings[1].difference
    assert difference is not None
    assert (difference.low, difference.high) == pytest.approx(paired_interval(sums["a"], sums["b"], units))
    assert results.table()[0] == ["trial", "eval loss", "over seeds", "loss less the best's", "state"]


def test_the_direction_of_a_metric(tmp_path: Path) -> None:
    runs = {"a": [run(tmp_path / "a", 1.0, steps=40)], "b": [run(tmp_path / "b", 2.0, steps=80)]}
    values = {name: members[0].exported.numbers("eval")["exact_match"] for name, members in runs.items()}
    results = sweep_results("eval.exact_match", runs)
    assert results.settings[0].name == max(values, key=lambda name: values[name])
    assert "there is no interval" in results.verdict()


def test_runs_that_are_not_finished(tmp_path: Path) -> None:
    failed = run(tmp_path / "failed", 0.5)
    (tmp_path / "failed" / "status.json").write_text(json.dumps({"exit_code": 3, "reason": "the loss is not finite"}))
    failed = read_run(tmp_path / "failed")
    nothing = sweep_results("eval.loss", {"failed": [failed]})
    assert nothing.best is None
    assert nothing.page() is None
    assert nothing.verdict() == "no trial is finished"
    results = sweep_results("eval.loss", {"failed": [failed], "a": [run(tmp_path / "a", 1.0)]})
    assert [setting.name for setting in results.settings] == ["a", "failed"]
    assert results.verdict() == "only a is finished: eval loss 1"
    assert results.table()[1][1] == ["failed", "–", "–", "the loss is not finite"]
