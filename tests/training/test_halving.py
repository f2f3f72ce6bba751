"""Successive halving: the steps of its comparisons, and the settings that end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.artifacts.test_sweep_results import run
from tunekit.artifacts.report.sweep_results import sweep_results
from tunekit.artifacts.report.values import read_run
from tunekit.training.halving import dropped_settings, rung_count, rung_step
from tunekit.training.rungs import crowded_rungs, runs_by_setting


@pytest.mark.parametrize(("settings", "count"), [(1, 0), (2, 1), (3, 1), (4, 2), (7, 2), (16, 4)])
def test_each_comparison_halves(settings: int, count: int) -> None:
    assert rung_count(settings) == count
    steps = [rung_step(96, left, 1) for left in range(count, 0, -1)]
    assert steps == [96 // 2**left for left in range(count, 0, -1)]


def test_a_comparison_is_at_an_evaluation() -> None:
    assert [rung_step(100, left, 8) for left in (4, 3, 2, 1)] == [8, 16, 32, 56]
    assert rung_step(10, 1, 100) == 10


def test_the_worse_half_ends_unless_it_cannot_be_distinguished(tmp_path: Path) -> None:
    losses = {"a": 1.0, "b": 1.2, "c": 1.001, "d": 1.5, "e": 1.3}
    clear = {name: [run(tmp_path / name, loss)] for name, loss in losses.items()}
    assert dropped_settings(sweep_results("eval.loss", clear)) == ["e", "d"]
    names = ("a", "c")
    unclear = {name: [run(tmp_path / f"noisy {name}", losses[name], 0.2, seed)] for seed, name in enumerate(names)}
    assert dropped_settings(sweep_results("eval.loss", unclear)) == []
    assert dropped_settings(sweep_results("eval.loss", {name: clear[name] for name in names})) == ["c"]
    assert len(dropped_settings(sweep_results("eval.loss", unclear), most=1)) == 1
    metrics = sweep_results("eval.exact_match", unclear)
    assert len(dropped_settings(metrics)) == 1


def test_a_paused_run_is_judged_by_the_evaluation_that_it_would_export(tmp_path: Path) -> None:
    """With evaluation.best, this is its best one, whose rows are kept; the last one has no rows."""
    runs = {}
    for seed, name in enumerate("abcd"):
        paused = run(tmp_path / name, 1.0 + seed / 1000, 0.3, seed)
        file = paused.path / "metrics.jsonl"
        later = {"step": 80, "eval": {"loss": 3.0 - seed / 10}}
        file.write_text(file.read_text("utf-8") + json.dumps(later) + "\n", encoding="utf-8")
        plan = json.loads((paused.path / "plan.json").read_text("utf-8"))
        plan["recipe"]["evaluation"] = {"best": "eval.loss"}
        (paused.path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        (paused.path / "report.json").unlink()
        runs[name] = [read_run(paused.path)]
    results = sweep_results("eval.loss", runs, finished=False)
    assert [(each.name, round(each.mean or 0, 3)) for each in results.settings] == [
        *(("a", 1.0), ("b", 1.001), ("c", 1.002), ("d", 1.003))
    ]
    assert dropped_settings(results) == []


def trial(name: str, steps: int, eval_steps: int) -> Any:
    recipe = SimpleNamespace(training=SimpleNamespace(eval_steps=eval_steps))
    rows = SimpleNamespace(objective=SimpleNamespace(loss=SimpleNamespace(updates_per_sampling=1)))
    trial = SimpleNamespace(name=name, setting=name, loaded=SimpleNamespace(recipe=recipe))
    return SimpleNamespace(recipe=trial, plan=object(), planned=SimpleNamespace(rows=rows), steps=steps)


def test_comparisons_without_training_between_them_are_named() -> None:
    crowded = crowded_rungs([trial(f"r={at}", 30, 10) for at in range(8)])
    (text,) = crowded
    assert text.startswith("r=0 is compared at the steps 10, 10, 20 of 30: ")
    assert text.endswith("lower training.eval_steps to 3")
    assert crowded_rungs([trial(f"r={at}", 30, 3) for at in range(8)]) == []


def test_settings_that_a_later_comparison_ended_come_first(tmp_path: Path) -> None:
    trials = [SimpleNamespace(recipe=SimpleNamespace(setting=name), path=tmp_path / name) for name in "abcd"]
    (tmp_path / "rungs.json").write_text('{"rungs": [["d", "a"], ["c"]]}', encoding="utf-8")
    runs: Any = trials
    assert list(runs_by_setting(runs)) == ["b", "c", "d", "a"]
    assert list(runs_by_setting(runs[:2])) == ["b", "a"]
