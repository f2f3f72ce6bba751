"""report.html and the comparison of runs, as text; a browser looks at them in test_html_browser.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.run_case import write_run
from tunekit.artifacts.report.compare import comparison_report, differing_keys, outcome_table, same_but_seed
from tunekit.artifacts.report.curves import MOST_POINTS, charts_of
from tunekit.artifacts.report.html import html_page
from tunekit.artifacts.report.run_report import run_report
from tunekit.artifacts.report.values import read_run
from tunekit.errors import InputError


def test_a_run_is_told_with_its_own_numbers(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "first"))
    page = html_page(run_report(run))
    for text in ("<title>first</title>", "lora of rank 16", "839.2 MiB", "predicted 858.3 MiB", "(+2.3%)", "too long"):
        assert text in page
    assert "two lemon cakes" in page
    assert "I cannot &lt;b&gt;say&lt;/b&gt;" in page  # a model's answer is text, never a tag
    cells = re.sub(r' data-head="[^"]*"', "", page)
    assert "<td>eval.jsonl:6</td><td>7</td><td>2.6</td>" in cells  # a worst row: its units, its loss before and after
    assert '<th scope="col" class="text">text (the trained part is marked)</th>' in page  # left, as its cells are
    assert "cakes?<mark>&lt;u&gt;two&lt;/u&gt; lemon cakes</mark>" in page
    charts = {chart.id: chart for chart in charts_of([run])}
    assert charts["chart-loss"].series[0].y == [float(f"{record['loss']:.5g}") for record in run.steps]
    assert charts["chart-loss"].series[-1].x == [0, 40]


def test_nothing_of_a_file_ends_the_script_or_shows_a_token(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x", verdict="worse: hf_" + "a" * 34 + "</script><img src=x>")
    page = html_page(run_report(read_run(folder)))
    assert "<img" not in page
    assert "hf_" not in page
    assert page.count("</script>") == 2
    data = re.search(r'id="data">(.*?)</script>', page, re.S)
    assert data is not None
    assert json.loads(data.group(1))["charts"]


@pytest.mark.drawn
def test_a_long_run_stays_small_and_keeps_its_mean(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "long", steps=20_000, rate=1e-4))
    assert len(html_page(run_report(run))) < 300_000
    (chart, *_) = charts_of([run])
    assert len(chart.series[0].y) == MOST_POINTS
    mean = sum(record["loss"] for record in run.steps) / len(run.steps)
    assert sum(chart.series[0].y) / MOST_POINTS == pytest.approx(mean, rel=1e-4)


def test_a_run_that_goes_on_has_a_page(tmp_path: Path) -> None:
    page = html_page(run_report(read_run(write_run(tmp_path / "going", steps=3, finished=False))))
    assert "3 of 3 steps" in page


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not contain a run"):
        read_run(tmp_path)


def test_runs_are_compared_by_what_differs(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / f"run-{at}", seed=seed, rate=rate))
        for at, (seed, rate) in enumerate([(0, 1e-3), (1, 1e-3), (0, 1e-1)])
    ]
    assert differing_keys(runs) == [
        ["training.learning_rate", "0.001", "0.001", "0.1"],
        ["training.seed", "0", "1", "0"],
    ]
    outcome = outcome_table(runs)
    assert outcome.names[:2] == ["eval loss", "eval exact_match"]
    losses = [row[0] for row in outcome.values]
    assert losses == [run.report["eval_loss"] for run in runs]
    ((names, cells),) = same_but_seed(runs)
    assert names == "run-0, run-1"
    mean, spread = (float(text) for text in cells[0].split(" ± "))
    assert mean == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-3)
    assert spread == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5, rel=1e-2, abs=1e-4)
    page = html_page(comparison_report(runs))
    assert "training.learning_rate" in page
    assert "weight_decay" not in page


def test_a_single_run_is_compared_with_its_start(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    outcome = outcome_table([run])
    values = dict(zip(outcome.labels, outcome.values[0], strict=True))
    before = next(record for record in run.evaluations if record["step"] == 0)
    assert values["eval loss before training"] == before.numbers("eval")["loss"]
    assert values["eval loss"] == run.report["eval_loss"] != values["eval loss before training"]


@pytest.mark.parametrize("prompt", ["the end of a long question " * 20, "長い質問の終わり" * 50])
def test_a_long_prompt_is_shown_with_its_end(prompt: str, tmp_path: Path) -> None:
    """Also in a language without blanks between words."""
    folder = write_run(tmp_path / "x")
    text = (folder / "metrics.jsonl").read_text("utf-8")
    (folder / "metrics.jsonl").write_text(text.replace("<|user|>cakes?", prompt), "utf-8")
    shown = re.search(r"\[\.\.\.\] ([^<]+)<", html_page(run_report(read_run(folder))))
    assert shown is not None
    assert prompt.endswith(shown[1])
    assert len(shown[1]) > 200
