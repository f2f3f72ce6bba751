"""The comparison of a sweep's settings: order, spread, intervals over the rows of all seeds, and the verdict."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import pytest

from tests.support.run_case import write_run
from tunekit.artifacts.report.html import html_page
from tunekit.artifacts.report.markdown import markdown_page
from tunekit.artifacts.report.paired import PairedDifference, difference_interval
from tunekit.artifacts.report.sweep_page import sweep_page
from tunekit.artifacts.report.sweep_results import HALVED, sweep_results
from tunekit.artifacts.report.values import RunValues, read_run
from tunekit.basics import student
from tunekit.training.halving import dropped_settings

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
        "b has the best eval loss, 1; it is lower than all others on 30 evaluation rows (95% intervals, with one seed; "
        "sweep.seeds: 3 also measures other seeds)"
    )
    values = {"a": {"adapter.r": 4}, "b": {"adapter.r": 8}, "c": {"adapter.r": 16}}
    page = sweep_page(results, values, ("runs/best.yaml", "model: org/base\n"))
    for text in (html_page(page), markdown_page(page)):
        assert "cannot be distinguished" in text
    assert [page.tone, sweep_page(two, values, ("runs/best.yaml", "model: org/base\n")).tone] == ["neutral", "good"]


def test_the_verdict_names_the_rule_that_overrules_an_interval(tmp_path: Path) -> None:
    one, other = run(tmp_path / "a", 1.0), run(tmp_path / "b", 1.0)
    rows = json.loads((tmp_path / "b" / "evaluation_rows.json").read_text("utf-8"))
    rows["losses"] = [
        loss + (8.0 if at in (4, 9, 17) else 1.0) * units
        for at, (loss, units) in enumerate(zip(rows["losses"], rows["units"], strict=True))
    ]
    (tmp_path / "b" / "evaluation_rows.json").write_text(json.dumps(rows), encoding="utf-8")
    other = read_run(tmp_path / "b")
    results = sweep_results("eval.loss", {"a": [one], "b": [other]})
    assert (found := results.settings[1].difference) is not None
    assert found.low > 0
    assert results.verdict().endswith(
        "it cannot be distinguished from b on 30 evaluation rows (a few rows differ much more than the others from b, "
        f"so {found.needed_rows:,} rows are needed)"
    )
    assert results.table()[1][1][2].endswith(",\ntoo few rows")  # type: ignore[attr-defined]


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
    assert (difference.low, difference.high) == pytest.approx(difference_interval(sums["a"], sums["b"], units))
    head = ["setting", "eval loss", "standard deviation\nover seeds", "loss minus the best's\n(95% interval)", "state"]
    assert results.table()[0] == head
    page = sweep_page(results, {"a": {}, "b": {}}, ("best.yaml", ""))
    assert (page.title, page.sections[0].title) == ("Sweep of 2 settings (4 trials)", "Settings")
    assert "The standard deviation (±) is that of the loss over the seeds" in page.sections[0].paragraphs[1]


def test_the_direction_of_a_metric(tmp_path: Path) -> None:
    runs = {"a": [run(tmp_path / "a", 1.0, steps=40)], "b": [run(tmp_path / "b", 2.0, steps=80)]}
    values = {name: members[0].exported.numbers("eval")["exact_match"] for name, members in runs.items()}
    results = sweep_results("eval.exact_match", runs)
    assert results.settings[0].name == max(values, key=lambda name: values[name])
    assert "there is no interval" in results.verdict()


def with_right(folder: Path, right: list[float], **more: Any) -> RunValues:
    """A run whose evaluation rows are answered right or wrong."""
    write_run(folder, **more)
    file = folder / "evaluation_rows.json"
    rows = json.loads(file.read_text("utf-8"))
    rows["metrics"] = {"exact_match": {"digests": rows["digests"], "values": right}}
    file.write_text(json.dumps(rows), encoding="utf-8")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    lines[-1]["eval"]["exact_match"] = sum(right) / len(right)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return read_run(folder)


def test_the_rows_of_a_metric_are_compared(tmp_path: Path) -> None:
    """With the direction of the metric; also if the runs have different objectives."""
    good, near, bad = [1.0] * 27 + [0.0] * 3, [1.0] * 25 + [0.0] * 2 + [1.0] + [0.0] * 2, [0.0] * 20 + [1.0] * 10
    runs = {name: [with_right(tmp_path / name, right)] for name, right in (("a", bad), ("b", good), ("c", near))}
    results = sweep_results("eval.exact_match", runs)
    assert [setting.name for setting in results.settings] == ["b", "c", "a"]
    text = "b has the best eval exact match, 0.9; it cannot be distinguished from c on 30 evaluation rows"
    assert results.verdict() == text
    assert [setting.name for setting in results.unclear] == ["c"]
    difference = results.settings[2].difference
    assert difference is not None
    ends = difference_interval(np.array(good), np.array(bad), np.ones(30))
    assert (difference.low, difference.high) == pytest.approx(ends)
    assert results.table()[0][2] == "exact match minus the best's\n(95% interval)"
    only = sweep_results("eval.exact_match", {name: runs[name] for name in "ab"})
    assert "it is higher than all others on 30 evaluation rows" in only.verdict()


def test_parallel_coordinates(tmp_path: Path) -> None:
    losses = {"a": 2.0, "b": 1.0, "c": 1.5}
    runs = {name: [run(tmp_path / name, loss, 0.01)] for name, loss in losses.items()}
    values = {
        "a": {"adapter.r": 16, "adapter.method": "lora", "training.epochs": 1},
        "b": {"adapter.r": 4, "adapter.method": "dora", "training.epochs": 1},
        "c": {"adapter.r": 8, "adapter.method": "lora", "training.epochs": 1},
    }
    page = sweep_page(sweep_results("eval.loss", runs), values, ("best.yaml", "model: org/base\n"))
    (axes,) = [section.axes for section in page.sections if section.axes is not None]
    assert [axis.title for axis in axes.axes] == ["r", "method", "loss"]
    assert list(axes.axes[0].ticks) == [("4", 0.0), ("8", 0.5), ("16", 1.0)]
    heights = {line.label.partition(":")[0]: list(line.heights) for line in axes.lines}
    assert heights == {"b": [0.0, 0.0, 1.0], "c": [0.5, 1.0, pytest.approx(0.5)], "a": [1.0, 1.0, 0.0]}
    assert [line.kind for line in axes.lines] == ["other", "other", "best"]
    (charts,) = [section.charts for section in page.sections if section.charts]
    curves = {series.label.partition(",")[0]: series.color for series in charts[0].series}
    assert {line.label.partition(":")[0]: line.color for line in axes.lines} == curves == {"b": 0, "c": 1, "a": 2}
    text = html_page(page)
    assert "tunekit train best.yaml" in text
    assert "<polyline" not in text
    assert text.count('<g class="other" style="stroke:var(--c') == 2


REASON = f"step 3: the loss is not finite; rows {', '.join(f'gen.jsonl:{at}' for at in range(30))}"


def ended(folder: Path, exit_code: int, reason: str, loss: float) -> RunValues:
    """A run without a result that ended with this status."""
    run(folder, loss)
    (folder / "report.json").unlink()
    (folder / "status.json").write_text(json.dumps({"exit_code": exit_code, "reason": reason}), encoding="utf-8")
    return read_run(folder)


def test_runs_that_are_not_finished(tmp_path: Path) -> None:
    failed = ended(tmp_path / "failed", 3, REASON, 0.5)
    nothing = sweep_results("eval.loss", {"failed": [failed]})
    assert nothing.best is None
    assert nothing.verdict() == "no trial is finished"
    results = sweep_results("eval.loss", {"failed": [failed], "a": [run(tmp_path / "a", 1.0)]})
    assert [setting.name for setting in results.settings] == ["a", "failed"]
    assert results.verdict() == "only a is finished: eval loss 1; not finished: 1 failed"
    assert results.table()[1][1] == ["failed", "0.5 at step 40", "–", "failed"]
    assert results.incomplete == "# best of a sweep in which not every run is finished: failed (failed)\n"
    assert not sweep_results("eval.loss", {"b": [run(tmp_path / "b", 1.0)]}).incomplete
    states = [(run["state"], run["reason"]) for setting in results.values()["settings"] for run in setting["runs"]]
    assert states == [("finished", "finished"), ("failed", REASON)]
    page = sweep_page(results, {"a": {}, "failed": {}}, ("best.yaml", ""))
    (table,), below = page.sections[0].tables, page.sections[1].paragraphs
    assert [row[-1] for row in table.rows] == ["finished", "failed"]
    assert below == [f"failed failed: {REASON}"]


def test_a_run_that_time_ended_counts_and_is_named(tmp_path: Path) -> None:
    runs = {"a": [run(tmp_path / "a", 1.0)], "b": [ended(tmp_path / "b", 0, "stopped_by_time", 0.9)]}
    results = sweep_results("eval.loss", runs)
    assert [each.name for each in results.settings] == ["b", "a"]
    assert results.incomplete == "# best of a sweep in which not every run is finished: b (stopped by max_minutes)\n"
    assert [each["runs"][0]["state"] for each in results.values()["settings"]] == ["stopped by max_minutes", "finished"]
    assert [line[-1] for line in results.table()[1]] == ["stopped by max_minutes", "finished"]


def test_the_results_of_halving(tmp_path: Path) -> None:
    """Trials that it ended show their last evaluation, and are not drawn; the winner is named once."""
    runs = {
        "bad": [ended(tmp_path / "bad", 3, REASON, 2.6)],
        "late": [ended(tmp_path / "late", 143, "ended by halving after step 40", 1.4)],
        "early": [ended(tmp_path / "early", 143, "ended by halving after step 40", 1.2)],
        "a": [run(tmp_path / "a", 1.0, 0.01)],
    }
    compared = {name: [replace(each, status={"exit_code": 143}) for each in runs[name]] for name in ("late", "a")}
    earlier = sweep_results("eval.loss", compared, finished=False).verdict()
    results = replace(sweep_results("eval.loss", runs), earlier=earlier)
    assert results.verdict() == "a won the comparisons: eval loss 1; not finished: 2 ended by halving, 1 failed"
    cells = [line[:2] + line[-1:] for line in results.table()[1]]
    assert cells[1:3] == [["late", "1.4 at step 40", HALVED], ["early", "1.2 at step 40", HALVED]]
    assert [line[0] for line in cells] == ["a", "late", "early", "bad"]
    shown = results.values()["settings"][1]["runs"][0]
    assert (shown["state"], shown["outcome"], shown["evaluated"]) == (HALVED, None, {"step": 40, "value": 1.4})
    values = {name: {"adapter.r": at} for at, name in enumerate(runs)}
    page = sweep_page(results, values, ("best.yaml", ""))
    assert not [section for section in page.sections if section.axes is not None]
    more = replace(sweep_results("eval.loss", runs | {"b": [run(tmp_path / "b", 1.1)]}), earlier=earlier)
    page = sweep_page(more, values | {"b": {"adapter.r": 9}}, ("best.yaml", ""))
    assert "lower than all others" in more.verdict()
    assert more.verdict().endswith("; not finished: 2 ended by halving, 1 failed")
    (section,) = [section for section in page.sections if section.axes is not None]
    assert section.axes is not None
    assert [line.label.partition(":")[0] for line in section.axes.lines] == ["b", "a"]
    assert section.paragraphs[1] == "Only finished settings are drawn; 3 settings did not finish."


def test_a_winner_of_unclear_comparisons(tmp_path: Path) -> None:
    names = {"a": run(tmp_path / "a", 1.0, 0.2), "b": run(tmp_path / "b", 1.01, 0.2)}
    earlier = sweep_results("eval.loss", {name: [each] for name, each in names.items()}).verdict()
    ended_b = replace(names["b"], status={"exit_code": 143, "reason": "ended by halving after step 40"})
    results = replace(sweep_results("eval.loss", {"a": [names["a"]], "b": [ended_b]}), earlier=earlier)
    assert (
        "a won the comparisons: eval loss 1; at the last one it could not be distinguished from b" in results.verdict()
    )
    other = replace(results, earlier=earlier.replace("a has the best", "b has the best"))
    assert other.verdict().startswith("only a is finished: ")


def test_a_difference_has_equally_many_digits() -> None:
    texts = [
        PairedDifference("b", "a", 30, value, 1.0, low, high).short_text()
        for value, low, high in ((1.0146, -0.08646, 0.1157), (3.9, 2.669, 3.307), (1.0, 0.0, 0.0), (1.1, -1e-9, 0.2))
    ]
    assert texts == [
        "+0.0146 (-0.0865 to +0.1157)",
        "+2.900 (+2.669 to +3.307)",
        "+0.0000 (+0.0000 to +0.0000)",
        "+0.1000 (+0.0000 to +0.2000)",
    ]


def test_a_setting_with_an_unfinished_run_cannot_win(tmp_path: Path) -> None:
    """The mean of its other seed is not the mean over the seeds of the other settings."""
    diverged = replace(run(tmp_path / "a1", 9.0, 0.1, 1), status={"exit_code": 3})
    runs = {
        "a": [run(tmp_path / "a0", 1.2), diverged],
        "b": [run(tmp_path / "b0", 1.0), run(tmp_path / "b1", 2.0, 0.1, 1)],
        "c": [run(tmp_path / "c0", 1.1), run(tmp_path / "c1", 2.2, 0.1, 1)],
    }
    results = sweep_results("eval.loss", runs)
    assert [setting.name for setting in results.settings] == ["b", "c", "a"]
    assert "a" not in [setting.name for setting in results.unclear]
    assert results.verdict().endswith("; a finished only 1 of 2 runs")
    assert dropped_settings(sweep_results("eval.loss", runs, finished=False)) == ["a"]


def test_the_verdict_names_a_setting_that_is_better_on_common_runs(tmp_path: Path) -> None:
    """A setting with an unfinished seed comes last, but the best of the others is not better than it."""
    diverged = replace(run(tmp_path / "b2", 9.0, 0.1, 2), status={"exit_code": 3})
    runs = {
        "a": [run(tmp_path / f"a{seed}", 2.0, 0.01, seed) for seed in range(3)],
        "b": [*(run(tmp_path / f"b{seed}", 1.0, 0.01, seed) for seed in range(2)), diverged],
    }
    assert sweep_results("eval.loss", runs).verdict() == (
        "a has the best eval loss, 2; on the runs and rows that both have, b is better; b finished only 2 of 3 runs"
    )


def test_the_verdict_names_a_setting_that_is_better_on_common_rows(tmp_path: Path) -> None:
    """The mean of `short` is over fewer rows, because it drops the long ones."""
    runs = {"short": [run(tmp_path / "short", 1.0, 0.01)], "long": [run(tmp_path / "long", 1.5, 0.01)]}
    file = tmp_path / "long" / "evaluation_rows.json"
    rows = json.loads(file.read_text("utf-8"))
    rows["losses"] = [
        0.8 * units if at < 20 else loss
        for at, (units, loss) in enumerate(zip(rows["units"], rows["losses"], strict=True))
    ]
    file.write_text(json.dumps(rows), encoding="utf-8")
    short = json.loads((tmp_path / "short" / "evaluation_rows.json").read_text("utf-8"))
    short |= {name: short[name][:20] for name in ("rows", "units", "digests", "losses", "before")}
    (tmp_path / "short" / "evaluation_rows.json").write_text(json.dumps(short), encoding="utf-8")
    results = sweep_results("eval.loss", {name: [read_run(tmp_path / name)] for name in runs})
    assert results.verdict() == "short has the best eval loss, 1; on the runs and rows that both have, long is better"
    assert not results.is_clear
    assert not results.unclear


def test_seeds_that_contradict_each_other_are_counted_with_folds_too(tmp_path: Path) -> None:
    losses = {"a": (1.0, 1.5, 1.0), "b": (1.5, 1.1, 1.5)}
    runs = {
        name: [
            run(tmp_path / f"{name}{seed}{fold}", loss, 1e-3, seed) for seed, loss in enumerate(each) for fold in (0, 1)
        ]
        for name, each in losses.items()
    }
    results = sweep_results("eval.loss", runs, folds=2)
    assert results.verdict().startswith("a has the best eval loss, 1.167; it cannot be distinguished from b on")
    assert results.over == "seeds and folds"
    one = sweep_results("eval.loss", {name: each[:2] for name, each in runs.items()}, folds=2)
    assert "with one seed" in one.verdict()


def test_finished_runs_without_the_metric(tmp_path: Path) -> None:
    """A metric can be undefined, such as a correlation with constant answers."""
    first, second = (run(tmp_path / name, 1.0) for name in "ab")
    lines = (second.path / "metrics.jsonl").read_text("utf-8").replace("exact_match", "other")
    (second.path / "metrics.jsonl").write_text(lines, encoding="utf-8")
    second = read_run(second.path)
    verdict = sweep_results("eval.exact_match", {"a": [first], "b": [second]}).verdict()
    assert verdict.startswith("only a is finished")
    assert verdict.endswith("; 1 finished without a number for eval exact match")
    assert sweep_results("eval.exact_match", {"b": [second]}).verdict() == (
        "1 finished without a number for eval exact match"
    )
    both = sweep_results("eval.exact_match", {"a": [first, second]}).verdict()
    assert both.endswith("a has a number for only 1 of 2 runs")


def with_units(folder: Path, factor: float, loss: float, noise: float, seed: int) -> RunValues:
    """A run whose evaluation rows have `factor` times as many tokens."""
    values = run(folder, loss, noise, seed)
    file = folder / "evaluation_rows.json"
    rows = json.loads(file.read_text("utf-8"))
    for name in ("losses", "units"):
        rows[name] = [factor * each for each in rows[name]]
    file.write_text(json.dumps(rows), encoding="utf-8")
    return read_run(values.path)


def test_the_interval_is_of_the_difference_that_orders_the_settings(tmp_path: Path) -> None:
    """Of the means over the folds, also if one fold has more tokens."""
    runs = {
        "a": [with_units(tmp_path / "a0", 50, 1.2, 0.01, 0), with_units(tmp_path / "a1", 1, 0.8, 0.01, 1)],
        "b": [with_units(tmp_path / "b0", 50, 1.1, 0.01, 0), with_units(tmp_path / "b1", 1, 1.1, 0.01, 1)],
    }
    results = sweep_results("eval.loss", runs, folds=2)
    assert [setting.mean for setting in results.settings] == pytest.approx([1.0, 1.1])
    difference = results.settings[1].difference
    assert difference is not None
    assert difference.difference == pytest.approx(0.1, abs=1e-6)
    assert difference.low < 0.1 < difference.high


def test_a_single_setting_has_its_mean_and_spread_as_verdict(tmp_path: Path) -> None:
    runs = {"the recipe": [run(tmp_path / f"r{fold}", 1.0 + fold) for fold in range(2)]}
    assert sweep_results("eval.loss", runs, folds=2).verdict() == "eval loss 1.5 ± 0.7071 over 2 folds"


def test_the_interval_over_seeds_covers_their_spread(tmp_path: Path) -> None:
    """Differences of three seeds that contradict each other leave the settings indistinguishable."""
    losses = {"a": (1.0, 1.1, 1.2), "b": (1.05, 1.13, 1.29), "c": (1.3, 1.0, 1.4)}
    runs = {
        name: [run(tmp_path / f"{name}{seed}", loss, 1e-3, seed=seed) for seed, loss in enumerate(each)]
        for name, each in losses.items()
    }
    results = sweep_results("eval.loss", runs)
    assert [setting.name for setting in results.settings] == ["a", "b", "c"]
    near, far = results.settings[1].difference, results.settings[2].difference
    assert near is not None
    assert far is not None
    rows = sweep_results("eval.loss", runs, folds=3).settings[1].difference
    assert rows is not None
    assert rows.low > 0.04  # over rows alone
    spread = stdev([0.05, 0.03, 0.09])
    assert near.difference - near.low == pytest.approx(4.3027 * spread / 3**0.5, rel=0.02)
    assert near.low < 0 < near.high
    assert far.low < 0 < far.high
    assert results.verdict().startswith("a has the best eval loss, 1.1; it cannot be distinguished from b, c")


def test_students_quantiles() -> None:
    known = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 30: 2.042}
    for freedom, value in known.items():
        assert student(freedom) == pytest.approx(value, rel=0.01)


def test_a_source_is_compared_with_all_sources(tmp_path: Path) -> None:
    names = {"without=nothing": 1.1, "without=a.jsonl": 1.3, "without=b.jsonl": 1.0}
    runs = {name: [run(tmp_path / name, loss, 1e-3)] for name, loss in names.items()}
    sentences = sweep_results("eval.loss", runs).contributions()
    assert [sentence.partition(":")[0] for sentence in sentences] == [
        "without=b.jsonl is better than without=nothing",
        "without=a.jsonl is worse than without=nothing",
    ]
    assert sweep_results("eval.loss", {"r=1": runs["without=nothing"]}).contributions() == []


def test_a_source_is_compared_by_any_metric_over_all_seeds(tmp_path: Path) -> None:
    good, bad = [1.0] * 29 + [0.0], [0.0] * 29 + [1.0]
    rights = {"without=nothing": good, "without=a.jsonl": bad}
    runs = {
        name: [with_right(tmp_path / f"{name},seed={seed}", right, seed=seed) for seed in range(2)]
        for name, right in rights.items()
    }
    (sentence,) = sweep_results("eval.exact_match", runs).contributions()
    assert sentence.startswith(
        "without=a.jsonl is worse than without=nothing: evaluation exact match 0.03333 against 0.9667"
    )
