"""RUN@STEP, RUN@best, RUN@last and checkpoint folders as TARGET: what a run that was stopped has, is used as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import write_tiny_llama
from tests.support.train_case import records, result_bytes, train_in_child, write_recipe
from tunekit.adapter import export_checkpoint_verb
from tunekit.errors import InputError, RunFolderError
from tunekit.evaluate import evaluate_verb
from tunekit.exports.questions import row_ids
from tunekit.generate import generate_verb
from tunekit.merge import merge_verb
from tunekit.targets.exportable import make_exportable
from tunekit.targets.target import find_target


@pytest.fixture(scope="module")
def recipe(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    training = {"save_steps": 1, "keep_checkpoints": 20, "eval_steps": 2}
    return write_recipe(
        tmp_path_factory.mktemp("work"), tiny_llama, training=training, evaluation={"best": "eval.loss"}
    )


@pytest.fixture(scope="module")
def stopped(recipe: Path) -> Path:
    """A run that has all its checkpoints and no result yet."""
    run = recipe.parent / "run"
    ended = train_in_child(recipe, run)
    assert ended.code == 0, ended.output
    shutil.move(run / "adapter", recipe.parent / "result")
    (run / "status.json").unlink()
    return run


def loss_of(target: str | Path, folder: Path) -> float:
    evaluate_verb(str(target), None, None, None, [], str(folder / "values.json"), [])
    return float(json.loads((folder / "values.json").read_text())["loss"])


@pytest.mark.drawn
def test_a_checkpoint_has_the_loss_that_the_run_had_then(stopped: Path, tmp_path: Path) -> None:
    logged = {record["step"]: record["eval"]["loss"] for record in records(stopped) if "eval" in record}
    last = max(logged)
    assert loss_of(f"{stopped}@2", tmp_path) == pytest.approx(logged[2], rel=1e-6)
    assert loss_of(f"{stopped}@last", tmp_path) == pytest.approx(logged[last], rel=1e-6)
    assert loss_of(f"{stopped}@best", tmp_path) == pytest.approx(min(logged.values()), rel=1e-6)
    assert loss_of(stopped / "checkpoints" / "step-000004", tmp_path) == pytest.approx(logged[4], rel=1e-6)
    assert logged[2] != logged[4]


def test_a_checkpoint_answers_and_is_merged_and_exported(
    stopped: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate_verb(f"{stopped}@1", None, ["say 3"], None, ["evaluation.max_new_tokens=2"])
    merge_verb(f"{stopped}@3", str(tmp_path / "merged"), None, None, [])
    assert (tmp_path / "merged" / "config.json").exists()
    export_checkpoint_verb(f"{stopped}@best", None, str(recipe.parent / "again" / "adapter"))
    again, result = recipe.parent / "again" / "adapter", recipe.parent / "result"
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in result.iterdir()
    }
    assert "is written to" in capsys.readouterr().out


def test_what_is_no_checkpoint_is_said_with_those_that_there_are(stopped: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RunFolderError,
        match=r"run has no checkpoint '99'; its checkpoints are 1, 2, 3.* \(older ones are removed.*; write .*run@STEP",
    ):
        find_target(f"{stopped}@99", None, [])
    with pytest.raises(RunFolderError, match="has no checkpoint 'first'"):
        find_target(f"{stopped}@first", None, [])
    with pytest.raises(InputError, match="names no checkpoint; write RUN@120"):
        export_checkpoint_verb(str(stopped), None, str(tmp_path / "adapter"))
    with pytest.raises(RunFolderError, match="was trained on a different base than"):
        find_target(f"{stopped}@1", str(write_tiny_llama(tmp_path / "other", seed=1)), [])
    with pytest.raises(InputError, match=r"--base: there is no folder or file .*gone; check the path"):
        find_target(f"{stopped}@1", str(tmp_path / "gone"), [])


def test_a_run_is_merged_and_compared_without_its_rows(
    stopped: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = recipe.parent / "train.jsonl"
    rows.rename(tmp_path / "moved.jsonl")
    try:
        merge_verb(f"{stopped}@3", str(tmp_path / "merged"), None, None, [])
        _, described = row_ids(make_exportable(find_target(f"{stopped}@3", None, [])), 8, 128, held_out=True)
    finally:
        (tmp_path / "moved.jsonl").rename(rows)
    reason = "fixed texts, because the run's rows cannot be read (train.jsonl: no such file)"
    assert reason in capsys.readouterr().out.replace(f"{recipe.parent.resolve()}/", "").replace("\n", " ")
    assert described.replace(f"{recipe.parent.resolve()}/", "") == reason


def test_other_evaluation_steps_do_not_forbid_a_resume(stopped: Path, recipe: Path) -> None:
    run = recipe.parent / "resumed"
    shutil.copytree(stopped, run)
    for checkpoint in (run / "checkpoints").iterdir():
        if checkpoint.name > "step-000003":
            shutil.rmtree(checkpoint)
    ended = train_in_child(recipe, run, "training.eval_steps=1", resume=True)
    assert ended.code == 0, ended.output
    assert [record["step"] for record in records(run) if "eval" in record][-3:] == [
        record["step"] for record in records(run) if "loss" in record
    ][-3:]
    best = min((record["eval"]["loss"], record["step"]) for record in records(run) if "eval" in record)[1]
    export_checkpoint_verb(f"{run}@{best}", None, str(recipe.parent / "best" / "adapter"))
    assert result_bytes(run) == result_bytes(recipe.parent / "best")
