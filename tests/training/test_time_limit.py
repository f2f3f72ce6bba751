"""training.max_minutes: when a run ends, with what result, and how it continues."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.ranks_case import train_in_ranks, write_case
from tests.support.train_case import (
    in_child,
    records,
    result_bytes,
    train,
    train_in_child,
    without_times,
    write_recipe,
)
from tunekit.artifacts.report.values import run_values
from tunekit.artifacts.stopped import named_state
from tunekit.errors import Problem, RecipeError
from tunekit.planning.notes import fitting_text, time_notes
from tunekit.recipe.load import load_recipe
from tunekit.runs import run_line
from tunekit.training import time_limit
from tunekit.training.run_files import restore_end
from tunekit.training.state import LoopState
from tunekit.training.time_limit import DISK_BYTES, REPORT_SECONDS, RunEnd, TimeLimit

LIMIT = "training.max_minutes=60"


def status_of(run: Path) -> dict[str, object]:
    values: dict[str, object] = json.loads((run / "status.json").read_text())
    return values


def over_at(step: int | None, rank: int | None = None) -> Callable[[], None]:
    """In a child: the time is up after `step`, or after each step; on one rank only, if `rank` is given."""

    def before() -> None:
        def is_over(limit: TimeLimit, state: LoopState, ending: RunEnd) -> bool:
            here = rank is None or os.environ.get("RANK") == str(rank)
            return here and (step is None or state.step == step)

        TimeLimit.is_over = is_over  # type: ignore[method-assign]

    return before


@pytest.fixture(scope="module")
def recipe(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("limit")
    return write_recipe(work, tiny_llama, evaluation={"best": "eval.loss", "patience": 1}, training={"eval_steps": 2})


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """The run that is never stopped."""
    run = recipe.parent / "whole"
    ended = train_in_child(recipe, run)
    assert ended.code == 0, ended.output
    return run


@pytest.fixture(scope="module")
def limited(recipe: Path) -> Path:
    """The same run, ended by time after step 3."""
    run = recipe.parent / "limited"
    ended = train_in_child(recipe, run, LIMIT, before=over_at(3))
    assert ended.code == 0, ended.output
    output = " ".join(ended.output.split())
    assert "training.max_minutes ended the run after step 3 of 6, at 65% of training.learning_rate; use it:" in output
    return run


@pytest.mark.parametrize("value", ["0", "-1", "soon", ".inf", "[1]", "1e308"])
def test_a_bad_limit_is_refused(recipe: Path, value: str) -> None:
    with pytest.raises(RecipeError, match="max_minutes"):
        load_recipe(recipe, [f"training.max_minutes={value}"])


@pytest.mark.parametrize("steps", [["~training.epochs", "training.max_steps=9"], ["training.epochs=2"]])
def test_a_limit_stands_next_to_epochs_or_steps(recipe: Path, steps: list[str]) -> None:
    assert load_recipe(recipe, ["training.max_minutes=0.5", *steps]).recipe.training.limit_seconds == 30


def test_a_run_that_time_ended_has_a_result(limited: Path) -> None:
    assert status_of(limited) == {"exit_code": 0, "reason": "stopped_by_time", "finished": False}
    last = records(limited)[-1]
    assert (last["step"], "eval" in last) == (3, True)
    report = json.loads((limited / "report.json").read_text())
    assert [(each["first_step"], each["last_step"]) for each in report["starts"]] == [(1, 3)]
    assert 0 < report["starts"][0]["minutes"] < 5
    assert "export" in report["seconds"]
    page = (limited / "report.md").read_text()
    assert r"State: stopped by max\_minutes" in page
    assert "the schedule did not end" in page
    assert run_values(limited).state == run_line(limited).state == "stopped by max_minutes"


def test_its_name_means_its_result(limited: Path) -> None:
    state = named_state(limited, "r")
    assert state.folder == limited / "adapter"
    assert state.note.startswith("r: step ")
    assert state.note.endswith(" of 6, stopped by training.max_minutes")


@pytest.mark.drawn
def test_it_continues_for_as_long_again_and_ends_like_a_run_that_was_never_stopped(
    recipe: Path, limited: Path, whole: Path
) -> None:
    """The evaluation at the stop, which the recipe does not require, counts for nothing afterwards."""
    run = limited.with_name("continued")
    shutil.copytree(limited, run)
    for name in ("tasks.json", "exports.json"):
        (run / name).write_text("{}")
    ended = train_in_child(recipe, run, "training.max_minutes=90", resume=True, before=over_at(5))
    assert ended.code == 0, ended.output
    assert not (run / "tasks.json").exists()
    assert not (run / "exports.json").exists()
    assert status_of(run)["reason"] == "stopped_by_time"
    assert [record["step"] for record in records(run) if "eval" in record] == [0, 2, 4, 5]

    def as_printed() -> None:
        train(run / "recipe.yaml", resume=True)

    ended = in_child(as_printed, run.parent / "log")
    assert ended.code == 0, ended.output
    assert status_of(run) == status_of(whole)
    assert result_bytes(run) == result_bytes(whole)
    rows = [json.loads((place / "evaluation_rows.json").read_text()) for place in (run, whole)]
    assert rows[0] == rows[1]
    assert without_times(records(run)) == without_times(records(whole))
    report = json.loads((run / "report.json").read_text())
    assert [each["first_step"] for each in report["starts"]] == [1, 4, 6]
    assert train_in_child(recipe, run, resume=True).output.count("nothing to do") == 1


@pytest.mark.drawn
@pytest.mark.parametrize("change", ["training.learning_rate=0.02", "training.max_minutes=0.01"])
def test_a_refused_resume_leaves_the_result_and_its_records(recipe: Path, limited: Path, change: str) -> None:
    run = limited.with_name(change)
    shutil.copytree(limited, run)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    ended = train_in_child(recipe, run, change, resume=True)
    assert ended.code == 2, ended.output
    assert "repair it" not in " ".join(ended.output.split())
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    assert named_state(run, "r").folder == run / "adapter"


@pytest.mark.drawn
def test_it_is_audited(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train_in_child(recipe, run, LIMIT, before=over_at(3)).code == 0

    def audit() -> None:
        from tunekit.audit import audit_verb

        audit_verb(str(run), None, None, None)

    ended = in_child(audit, tmp_path / "log")
    assert ended.code == 0, ended.output
    assert "adapter/adapter_model.safetensors: equal" in " ".join(ended.output.split())


@pytest.mark.drawn
def test_ranks_stop_after_the_same_step(tmp_path: Path) -> None:
    recipe = write_case("sft", tmp_path, tmp_path)
    ended = train_in_ranks(recipe, tmp_path / "run", LIMIT, before=over_at(1, rank=1))
    assert [each.code for each in ended] == [0, 0], ended[0].output
    assert status_of(tmp_path / "run")["reason"] == "stopped_by_time"
    assert max(record["step"] for record in records(tmp_path / "run")) == 1


@pytest.mark.drawn
def test_a_run_with_reused_samples_stops_only_where_new_ones_are_drawn(tmp_path: Path) -> None:
    recipe = write_case("grpo", tmp_path, tmp_path)
    ended = train_in_child(recipe, tmp_path / "run", LIMIT, before=over_at(None))
    assert ended.code == 0, ended.output
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2]


@pytest.mark.drawn
def test_a_limit_that_leaves_no_step_is_refused_with_the_minutes_that_it_needs(recipe: Path, tmp_path: Path) -> None:
    ended = train_in_child(recipe, tmp_path / "run", "training.max_minutes=0.01")
    assert ended.code == 2, ended.output
    words = " ".join(ended.output.split())
    assert "training.max_minutes: a limit of 0.01 min leaves no time for a step: " in words
    assert "write at least 0." in words


@pytest.mark.drawn
def test_the_limit_is_that_of_each_trial(recipe: Path, tmp_path: Path) -> None:
    def sweep() -> None:
        from tunekit.recipe.reading.trial_recipes import load_sweep
        from tunekit.sweep import sweep_verb

        over_at(2)()
        words = [f"output.dir={tmp_path / 'sweep'}", LIMIT, "training.learning_rate=0.01,0.02"]
        sweep_verb(load_sweep(recipe, words), False, None)

    ended = in_child(sweep, tmp_path / "log")
    assert ended.code == 0, ended.output
    for run in (tmp_path / "sweep").glob("learning_rate=*"):
        assert status_of(run)["reason"] == "stopped_by_time"
        assert (run / "adapter" / "adapter_config.json").exists()
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["settings"][0]["mean"] is not None


@pytest.mark.drawn
def test_a_trial_that_uses_up_its_limit_before_a_comparison_of_halving_has_a_result(
    recipe: Path, tmp_path: Path
) -> None:
    """It paused at step 2, where it was compared; the time that is left then is too short for a step."""

    def sweep() -> None:
        from tunekit.recipe.reading.trial_recipes import load_sweep
        from tunekit.sweep import sweep_verb

        TimeLimit.lack = lambda limit, *values: Problem("too short", "write more") if limit.earlier else None  # type: ignore[method-assign]
        words = [f"output.dir={tmp_path / 'sweep'}", LIMIT, "~training.epochs", "training.max_steps=4"]
        words += ["training.learning_rate=0.01,0.02", "sweep.strategy=halving"]
        sweep_verb(load_sweep(recipe, words), False, None)

    ended = in_child(sweep, tmp_path / "log")
    assert ended.code == 0, ended.output
    runs = list((tmp_path / "sweep").glob("learning_rate=*"))
    assert len(runs) == 2
    assert any(status_of(run)["reason"] == "stopped_by_time" for run in runs)
    for run in runs:
        if status_of(run)["reason"] == "stopped_by_time":
            assert (run / "adapter" / "adapter_config.json").exists()
            starts = json.loads((run / "report.json").read_text())["starts"]
            assert [(each["first_step"], each["last_step"]) for each in starts] == [(1, 2)]


def test_the_limit_counts_from_the_start_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limit, "process_seconds", lambda: 40.0)
    limit = TimeLimit(60.0)
    assert 40.0 <= limit.elapsed < 45.0
    problem = limit.lack(LoopState(step=1, seconds={"train": 30.0}), RunEnd())
    assert problem is not None
    assert problem.what.startswith(
        "a limit of 1 min leaves no time for a step: 40 s have passed, a step takes about 30.0 s, "
    )
    assert problem.how == "write at least 1.2"


def test_a_resume_takes_the_minutes_of_earlier_starts_from_the_report() -> None:
    """The checkpoint was saved before the last evaluation and the export."""
    report = {"seconds": {"export": 3.0, "train": 9.0}, "starts": [{"first_step": 1, "last_step": 3, "minutes": 2.0}]}
    folder = SimpleNamespace(read_json=lambda name: report)
    saved = [{"first_step": 1, "last_step": 3, "minutes": 1.5}, {"first_step": 4, "last_step": 5, "minutes": 1.0}]
    state = LoopState(step=5, starts=saved)
    restore_end(SimpleNamespace(folder=folder), state)  # type: ignore[arg-type]
    assert [each["minutes"] for each in state.starts] == [2.0, 1.0]
    assert state.longest == {"export": 3.0}


# --- estimates -----------------------------------------------------------------------------------------------------


def test_the_end_of_a_run_is_estimated_from_what_it_measured() -> None:
    ending = RunEnd(numbers=10**8, evaluation_tokens=50, reads_best=True, stop_steps=2, micro_batches=3)
    state = LoopState(seconds={"try": 0.5})
    save = 12e8 / DISK_BYTES
    assert ending.first_seconds(state) == 3.0
    assert ending.seconds(state) == 3 * save + REPORT_SECONDS  # a save, the best one read, the export
    state = LoopState(step=10, tokens=100, seconds={"train": 20.0})
    assert ending.first_seconds(state) == 4.0
    assert ending.seconds(state) == 3 * save + 10.0 + REPORT_SECONDS  # 50 tokens of 0.2 s
    state.longest = {"save": 1.0, "evaluate": 4.0, "export": 2.0, "tasks": 8.0}
    assert ending.seconds(state) == 15.0 + REPORT_SECONDS


def test_evaluations_and_checkpoints_before_the_next_possible_stop_are_part_of_the_estimate() -> None:
    ending = RunEnd(evaluation_tokens=50, stop_steps=8, eval_steps=1, save_steps=4)
    state = LoopState(step=8, longest={"save": 1.0, "evaluate": 3.0, "export": 2.0})
    assert ending.seconds(state) == 2 * 1.0 + 8 * 3.0 + 2.0 + REPORT_SECONDS
    best = replace(ending, reads_best=True, eval_steps=5)  # an evaluation may write a checkpoint
    assert best.seconds(state) == 4 * 1.0 + 3 * 3.0 + 2.0 + REPORT_SECONDS


def test_the_longest_of_the_last_paces_counts() -> None:
    limit = TimeLimit(100.0, time.monotonic() - 90.0)
    state = LoopState(step=1)
    limit.paces.extend([5.0, 1.0])
    assert not limit.is_over(state, RunEnd())
    limit.paces.append(20.0)
    assert limit.is_over(state, RunEnd())
    limit.paces.extend([1.0] * 8)
    assert not limit.is_over(state, RunEnd())


def test_evaluations_and_saves_are_no_part_of_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    limit, state = TimeLimit(60.0, 0.0), LoopState(seconds={"evaluate": 3.0})
    limit.begin(state)
    now[0], state.seconds = 60.0, {"evaluate": 7.0, "save": 1.0}
    limit.begin(state)  # of a later step
    limit.mark(state)
    assert list(limit.paces) == [5.0]


def test_the_plan_says_how_many_steps_fit(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    loaded = load_recipe(recipe, ["training.max_minutes=10", f"output.dir={run}", "training.scheduler=linear"])
    assert "train RECIPE --dry-run estimates how many steps fit" in next(time_notes(loaded.recipe, 100))
    run.mkdir()
    report = {"seconds": {"train": 90, "save": 10, "load": 20}, "final_step": 10, "starts": [{"minutes": 1}] * 2}
    (run / "report.json").write_text(json.dumps(report))
    (note,) = time_notes(loaded.recipe, 100)  # 10 s for each step; 10 s of each start for other things
    assert (
        "training.max_minutes: 10: about 59 of 100 steps fit into one start (an estimate from the last run in" in note
    )
    assert "the schedule then stops at 42% of training.learning_rate" in note
    assert fitting_text(loaded.recipe, 100, 500, 2, "x").endswith(
        "about 100 of 100 steps fit into one start (an estimate from x)"
    )
    assert "10: probably no step fits into one start (an estimate from x); write at least 12.0" in fitting_text(
        loaded.recipe, 100, -60, 60, "x"
    )
    assert not list(time_notes(load_recipe(recipe).recipe, 100))
