"""A full disk, a damaged checkpoint, a second process, a changed recipe: a message, an exit code, nothing lost."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CHAT_TEMPLATE
from tests.runs.test_kill import Watched, assert_resumes_to, events_of, interrupted
from tests.support.train_case import kill_self, lose_the_end, records, result_bytes, train_in_child, write_recipe
from tunekit.artifacts.stopped import named_state
from tunekit.training.run import Run


@pytest.fixture(scope="module")
def recipe(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ["TUNEKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return write_recipe(tmp_path_factory.mktemp("failures"), tiny_llama, training={"keep_checkpoints": 2})


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    watched = Watched(run.parent / "events.txt")
    ended = train_in_child(recipe, run, before=watched.install)
    assert ended.code == 0, ended.output
    return run


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "what", ["tensors.safetensors", "state.json", "manifest.json", "metrics.jsonl", "adapter_model"]
)
def test_a_full_disk_is_one_message_and_the_run_goes_on_from_the_old_checkpoint(
    recipe: Path, whole: Path, tmp_path: Path, what: str
) -> None:
    events = events_of(whole.parent / "events.txt")
    writes = [number for number, (kind, path) in enumerate(events) if what in path and kind in ("write", "create")]
    ended = interrupted(recipe, tmp_path / "run", writes[-1], no_space)
    assert ended.code == 4, ended.output
    assert "Traceback" not in ended.output
    assert "space" in ended.output
    assert json.loads((tmp_path / "run" / "status.json").read_text())["exit_code"] == 4
    assert_resumes_to(recipe, tmp_path / "run", whole)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("damage", ["missing", "flipped", "short"])
def test_a_damaged_newest_checkpoint_falls_back(recipe: Path, whole: Path, tmp_path: Path, damage: str) -> None:
    run = tmp_path / "run"
    events = events_of(whole.parent / "events.txt")
    at = next(number for number, (_, path) in enumerate(events) if "step-000006" in path)
    interrupted(recipe, run, at, kill_self)
    newest = run / "checkpoints" / "step-000004"
    file = newest / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "short":
        file.write_bytes(content[:-7])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    ended = train_in_child(recipe, run, resume=True)
    assert ended.code == 0, ended.output
    assert "step-000004" in ended.output
    assert "step-000002" in ended.output
    assert result_bytes(run) == result_bytes(whole)


def test_every_checkpoint_damaged_is_refused(recipe: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    events = events_of(whole.parent / "events.txt")
    at = next(number for number, (_, path) in enumerate(events) if "step-000006" in path)
    interrupted(recipe, run, at, kill_self)
    for folder in (run / "checkpoints").glob("step-*"):
        (folder / "state.json").write_text("{}")
    ended = train_in_child(recipe, run, resume=True)
    assert ended.code == 2
    assert "every checkpoint" in ended.output


def test_a_second_process_is_refused_and_the_first_goes_on(recipe: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    seen: list[Any] = []

    def second() -> None:
        other = train_in_child(recipe, run, resume=True)
        (tmp_path / "second.txt").write_text(f"{other.code}\n{other.output}")

    events = events_of(whole.parent / "events.txt")
    at = next(number for number, (_, path) in enumerate(events) if "step-000002" in path)
    ended = interrupted(recipe, run, at, second)
    seen = (tmp_path / "second.txt").read_text().split("\n", 1)
    assert seen[0] == "2"
    assert "in use" in seen[1] or "another" in seen[1]
    assert ended.code == 0, ended.output
    assert result_bytes(run) == result_bytes(whole)


def test_a_finished_run_without_its_result_writes_it_again(recipe: Path, whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "adapter")
    assert named_state(run, "r").note.endswith(", whose result was deleted")
    ended = train_in_child(recipe, run, resume=True)
    assert ended.code == 0, ended.output
    assert result_bytes(run) == result_bytes(whole)


def test_a_finished_run_is_left_alone(recipe: Path, whole: Path) -> None:
    def stamps() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in whole.rglob("*")}

    before = stamps()
    ended = train_in_child(recipe, whole, resume=True)
    assert ended.code == 0
    assert "finished" in ended.output
    assert stamps() == before
    ended = train_in_child(recipe, whole, "training.learning_rate=0.5", resume=True)
    assert ended.code == 2
    assert "training.learning_rate: changed since the run: was" in ended.output
    assert stamps() == before


def test_a_changed_recipe_is_refused_before_the_base_is_loaded(recipe: Path, whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    lose_the_end(run)
    ended = train_in_child(recipe, run, "memory.sharding=full", resume=True)
    assert ended.code == 2
    assert 'memory.sharding: changed since the run: was "auto", is "full"; undo the change' in ended.output
    assert "loading" not in ended.output


def test_a_run_of_an_older_version_continues_unless_its_layers_were_compiled(
    recipe: Path, whole: Path, tmp_path: Path
) -> None:
    """Older versions wrote training.compile into recipe.yaml and the fingerprint, and `compiled` into plan.json."""

    def before() -> None:
        from tunekit.training import run_files

        make = run_files.make_fingerprint

        def older(values: Any, **facts: Any) -> Any:
            return make({**values, "training": {**values["training"], "compile": False}}, **facts)

        run_files.make_fingerprint = older

    run = tmp_path / "run"
    ended = train_in_child(recipe, run, before=before)
    assert ended.code == 0, ended.output
    lose_the_end(run)
    saved = run / "recipe.yaml"
    text = saved.read_text()
    plan = json.loads((run / "plan.json").read_text())
    for compiled, code in ((True, 2), (False, 0)):
        saved.write_text(text.replace("\ntraining:\n", f"\ntraining:\n  compile: {json.dumps(compiled)}\n"))
        plan["choice"]["compiled"] = compiled
        (run / "plan.json").write_text(json.dumps(plan))
        ended = train_in_child(saved, run, resume=True)
        assert ended.code == code, ended.output
        assert ("plan.json: the run was trained with compiled layers" in ended.output) is compiled
    assert result_bytes(run) == result_bytes(whole)
    assert "compile" not in saved.read_text()


def test_without_resume_a_folder_with_a_run_is_refused(recipe: Path, whole: Path) -> None:
    ended = train_in_child(recipe, whole)
    assert ended.code == 2
    assert "--resume" in ended.output


def change_row(recipe: Path) -> None:
    file = recipe.parent / "train.jsonl"
    file.write_text(file.read_text().replace("say very 1", "say most 1"))


def nothing(recipe: Path) -> None:
    pass


CHANGES: list[tuple[str, list[str], Callable[[Path], None], int]] = [
    ("training.learning_rate", ["training.learning_rate=0.02"], nothing, 2),
    ("adapter.r", ["adapter.r=8"], nothing, 2),
    ("training.epochs", ["training.epochs=3"], nothing, 2),
    ("data", [], change_row, 2),
    ("", ["training.save_steps=3", "training.keep_checkpoints=5", "output.report_to=[tensorboard]"], nothing, 0),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("named", "overrides", "change", "code"), CHANGES, ids=[c[0] or "allowed" for c in CHANGES])
def test_a_resume_with_something_changed(
    tiny_llama: Path, whole: Path, tmp_path: Path, named: str, overrides: list[str], change: Any, code: int
) -> None:
    recipe = write_recipe(tmp_path / "own", tiny_llama, training={"keep_checkpoints": 2})
    events = events_of(whole.parent / "events.txt")
    at = next(number for number, (_, path) in enumerate(events) if "step-000004" in path)
    interrupted(recipe, tmp_path / "run", at, kill_self)
    change(recipe)
    ended = train_in_child(recipe, tmp_path / "run", *overrides, resume=True)
    assert ended.code == code, ended.output
    if code:
        assert named in ended.output
    else:
        assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == (
            whole / "adapter" / "adapter_model.safetensors"
        ).read_bytes()
        assert list((tmp_path / "run" / "tracking").rglob("*tfevents*"))


@pytest.mark.drawn
def test_another_base_is_refused(tmp_path: Path, whole: Path) -> None:
    from tests.conftest import write_tiny_llama

    base = write_tiny_llama(tmp_path / "base")
    recipe = write_recipe(tmp_path / "own", base, training={"keep_checkpoints": 2})
    events = events_of(whole.parent / "events.txt")
    at = next(number for number, (_, path) in enumerate(events) if "step-000004" in path)
    interrupted(recipe, tmp_path / "run", at, kill_self)
    write_tiny_llama(base, seed=1)
    ended = train_in_child(recipe, tmp_path / "run", resume=True)
    assert ended.code == 2
    assert "base" in ended.output


@pytest.mark.parametrize("where", ["tunekit.planning.ranks.prepare", "tunekit.training.begin.load_model"])
def test_a_stop_signal_before_training_ends_the_run_at_once(recipe: Path, tmp_path: Path, where: str) -> None:
    def before() -> None:
        def stopped(*_: object, **__: object) -> None:
            try:
                signal.raise_signal(signal.SIGTERM)
            except Exception:
                print("swallowed")
            print("went on")

        module, _, name = where.rpartition(".")
        setattr(importlib.import_module(module), name, stopped)

    ended = train_in_child(recipe, tmp_path / "run", before=before)
    assert ended.code == 143, ended.output
    assert "stopped by SIGTERM before training began" in ended.output
    assert "went on" not in ended.output
    assert "swallowed" not in ended.output
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["exit_code"] == 143
    assert train_in_child(recipe, tmp_path / "run").code == 0  # nothing is in the way of a new start


def test_a_run_needs_neither_its_eval_file_nor_its_template_once_it_has_begun(tiny_llama: Path, tmp_path: Path) -> None:
    kept = {"template": tmp_path / "t.jinja", "eval": tmp_path / "eval.jsonl"}
    kept["template"].write_text(CHAT_TEMPLATE, encoding="utf-8")
    recipe = write_recipe(
        tmp_path,
        tiny_llama,
        data={"eval": [{"path": "eval.jsonl"}], "chat_template": "t.jinja"},
        training={"max_steps": 3, "eval_steps": 2, "epochs": None},
        evaluation={"metrics": ["loss", "exact_match"], "max_new_tokens": 2},
    )
    kept["eval"].write_bytes(b"".join((tmp_path / "train.jsonl").read_bytes().splitlines(keepends=True)[:3]))

    def before() -> None:
        def train(run: Run) -> None:
            for path in kept.values():
                path.unlink()
            plain(run)

        plain, Run.train = Run.train, train  # type: ignore[method-assign]

    ended = train_in_child(recipe, tmp_path / "run", before=before)
    assert ended.code == 0, ended.output
    assert [list(record["eval"]) for record in records(tmp_path / "run") if "eval" in record][-1][-1] == "exact_match"
    assert (tmp_path / "run" / "adapter" / "chat_template.jinja").read_text("utf-8") == CHAT_TEMPLATE
