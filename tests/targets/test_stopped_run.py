"""The plain name of a stopped run: which state it means, what is printed, and the exit code of each command."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Timer

import pytest

from tests.support.run_case import write_run
from tests.support.train_case import Ended, free_port, in_child, train_in_child, write_recipe
from tunekit.artifacts.checkpoint import find_checkpoint
from tunekit.artifacts.metrics_log import truncate_metrics
from tunekit.artifacts.stopped import named_state, next_commands
from tunekit.errors import RunFolderError
from tunekit.files.lock import FolderLock
from tunekit.targets.target import find_target
from tunekit.training import state

STOPPED = {"exit_code": 143, "reason": "stopped by SIGTERM after step 5 of 6", "finished": False}
Change = Callable[[Path], None]


def write_status(run: Path, **values: object) -> None:
    (run / "status.json").write_text(json.dumps(values), encoding="utf-8")


@pytest.fixture(scope="module")
def recipe(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    training = {"save_steps": 1, "keep_checkpoints": 20, "eval_steps": 2}
    work = tmp_path_factory.mktemp("work")
    return write_recipe(work, tiny_llama, training=training, evaluation={"best": "eval.loss"})


@pytest.fixture(scope="module")
def finished(recipe: Path) -> Path:
    run = recipe.parent / "finished"
    ended = train_in_child(recipe, run)
    assert ended.code == 0, ended.output
    return run


@pytest.fixture
def run(finished: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the run that SIGTERM has stopped after step 5: it has checkpoints, the best one of step 4, and no
    result."""
    place = finished.with_name(request.node.name.translate({ord(sign): "-" for sign in "[]/ "}))
    shutil.copytree(finished, place)
    shutil.rmtree(place / "adapter")
    shutil.rmtree(place / "checkpoints" / "step-000006")
    (place / "report.json").unlink()
    truncate_metrics(place / "metrics.jsonl", 5)
    write_status(place, **STOPPED)
    return place


def tensors(target: str) -> bytes:
    adapter = (spec := find_target(target, None, [])).adapter
    assert adapter is not None
    assert spec.holder is not None
    return (adapter / "adapter_model.safetensors").read_bytes()


def test_the_name_means_the_best_checkpoint(run: Path) -> None:
    spec = find_target(str(run), None, [])
    assert spec.kind == "checkpoint"
    assert spec.notes == (f"{run}: step 4 of 6, stopped by SIGTERM",)
    assert tensors(str(run)) == tensors(f"{run}@4") != tensors(f"{run}@last")


@pytest.mark.parametrize(
    ("status", "why"),
    [
        ({"exit_code": None, "reason": "running", "finished": False}, "killed"),
        ({"exit_code": 130, "reason": "stopped by SIGINT after step 5 of 6"}, "stopped by SIGINT"),
        ({"exit_code": 143, "reason": "ended by halving after step 2"}, "ended by halving"),
        ({"exit_code": 4, "reason": "out of memory"}, "ended with exit code 4: out of memory"),
    ],
)
def test_the_note_says_why_the_run_ended(tmp_path: Path, status: dict[str, object], why: str) -> None:
    run = write_checkpoints(tmp_path / "run", 20, 40)
    write_status(run, **status)
    state = named_state(run, "runs/first")
    assert state.folder == run / "checkpoints" / "step-000040"
    assert state.note == f"runs/first: step 40 of 40, {why}"


def write_checkpoints(run: Path, *steps: int, best: int | None = None) -> Path:
    """A run folder with checkpoints that contain no tensors. `best`: the best step, which the recipe chooses."""
    from tunekit.artifacts.checkpoint import save_checkpoint
    from tunekit.artifacts.run import RunFolder

    write_run(run, finished=False)
    plan = json.loads((run / "plan.json").read_text())
    plan["recipe"]["evaluation"] = {"best": best and "eval.loss"}
    (run / "plan.json").write_text(json.dumps(plan))
    with RunFolder.open_resume(run) as folder:
        for step in steps:
            save_checkpoint(folder, step, {}, {"loop": {"best_step": best}}, keep=9)
    return run


def test_a_deleted_best_checkpoint_is_named_and_the_last_one_used(tmp_path: Path) -> None:
    run = write_checkpoints(tmp_path / "run", 10, 30, best=20)
    write_status(run, **STOPPED)
    state = named_state(run, "r")
    assert state.folder.name == "step-000030"
    assert state.note == "r: step 30 of 40, stopped by SIGTERM; its best checkpoint, step 20, was deleted"


def test_a_damaged_last_checkpoint_is_passed_over(tmp_path: Path) -> None:
    run = write_checkpoints(tmp_path / "run", 10, 30)
    (run / "checkpoints" / "step-000030" / "state.json").write_text("{}")
    write_status(run, **STOPPED)
    assert named_state(run, "r").folder.name == "step-000010"


def test_a_run_without_a_checkpoint_names_the_command_that_continues_it(tmp_path: Path) -> None:
    run = write_checkpoints(tmp_path / "run")
    write_status(run, exit_code=143, reason="stopped by SIGTERM before the first step")
    with pytest.raises(
        RunFolderError, match=r"r has no result and no complete .*SIGTERM.*tunekit train .*run/recipe.yaml --resume"
    ):
        named_state(run, "r")


def test_the_best_checkpoint_of_a_run_that_time_ended_is_the_one_of_its_result(tmp_path: Path) -> None:
    """Its last evaluation found the best one, after the checkpoint was saved. After a resume, it counts for nothing."""
    run = write_checkpoints(tmp_path / "run", 10, 20, best=10)
    (run / "report.json").write_text(json.dumps({"best_step": 20, "final_step": 20}))
    write_status(run, exit_code=0, reason="stopped_by_time", finished=False)
    assert find_checkpoint(f"{run}@best") == run / "checkpoints" / "step-000020"
    write_status(run, **STOPPED)
    assert find_checkpoint(f"{run}@best") == run / "checkpoints" / "step-000010"


def test_an_old_result_is_not_used_after_a_resume(tmp_path: Path) -> None:
    """A run that max_minutes stopped has a result. After a resume that was killed, its checkpoints are newer."""
    run = write_checkpoints(tmp_path / "run", 20)
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text("{}")
    (run / "report.json").write_text(json.dumps({"final_step": 10}))
    write_status(run, exit_code=0, reason="stopped_by_time", finished=False)
    state = named_state(run, "r")
    assert state.folder == run / "adapter"
    assert state.note == "r: step 10 of 40, stopped by training.max_minutes"
    write_status(run, exit_code=None, reason="running", finished=False)
    assert named_state(run, "r").is_checkpoint
    write_status(run, exit_code=0, reason="finished")  # of an older version
    state = named_state(run, "r")
    assert (state.is_checkpoint, state.note) == (False, "")


def test_a_run_that_is_trained_is_refused_by_its_plain_name(run: Path) -> None:
    lock = FolderLock(run)
    try:
        with pytest.raises(RunFolderError, match=r"a process is training .*; use its last checkpoint, .*@last"):
            find_target(str(run), None, [])
        assert find_target(f"{run}@last", None, []).kind == "checkpoint"
    finally:
        lock.release()


def test_a_finished_run_whose_lock_is_held_is_used(tmp_path: Path) -> None:
    """`runs clean` holds the lock too."""
    run = write_checkpoints(tmp_path / "run", 20)
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text("{}")
    write_status(run, exit_code=0, reason="finished", finished=True)
    lock = FolderLock(run)
    assert named_state(run, "r").folder == run / "adapter"
    lock.release()


def test_the_next_commands_can_be_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = "use it: tunekit eval 'runs/my first'; continue it: tunekit train 'runs/my first/recipe.yaml' --resume"
    assert next_commands(tmp_path / "runs" / "my first") == commands
    assert next_commands(tmp_path / "r", alone=False).endswith("continue it: the same command with --resume")


def test_a_run_whose_best_checkpoint_was_deleted_continues_to_a_result(recipe: Path, run: Path) -> None:
    """Also if no later evaluation is better than the one of the deleted checkpoint."""
    shutil.rmtree(run / "checkpoints" / "step-000004")

    def first_is_best() -> None:
        vars(state)["is_better"] = lambda metric, value, best: best is None

    ended = train_in_child(recipe, run, resume=True, before=first_is_best)
    assert ended.code == 0, ended.output
    assert "the checkpoint of the best step, 4, was deleted; the result will be the best" in " ".join(
        ended.output.split()
    )
    assert json.loads((run / "report.json").read_text("utf-8"))["best_step"] == 6


@pytest.mark.drawn
def test_a_run_that_trains_its_base_is_used_too(recipe: Path, tmp_path: Path) -> None:
    run, stopped = tmp_path / "full", tmp_path / "stopped"
    ended = train_in_child(recipe, run, "adapter={method: full}")
    assert ended.code == 0, ended.output
    shutil.copytree(run, stopped)
    shutil.rmtree(stopped / "model")
    write_status(stopped, **STOPPED)
    spec = find_target(str(stopped), None, [])
    weights = Path(spec.model.name_or_path) / "model.safetensors"
    assert weights.read_bytes() == (run / "model" / "model.safetensors").read_bytes()
    assert command(["eval", str(stopped)], tmp_path / "log").code == 0


# --- every command -------------------------------------------------------------------------------------------------

COMMANDS: dict[str, list[str]] = {
    "eval": ["eval", "RUN"],
    "generate": ["generate", "RUN", "--prompt", "say 1", "--max-new-tokens", "2"],
    "chat": ["chat", "RUN"],
    "serve": ["serve", "RUN", "--port", "PORT"],
    "merge": ["merge", "RUN", "--output", "OUT/merged"],
    "export": ["export", "RUN", "--to", "vllm", "--output", "OUT/vllm", "--no-certify"],
    "adapter show": ["adapter", "show", "RUN"],
    "audit": ["audit", "RUN"],
    "data rank": ["data", "rank", "RUN"],
    "report": ["report", "RUN"],
    "runs": ["runs", "RUN"],
    "watch": ["watch", "RUN"],
}
INTERRUPTED = {"serve": 130}  # it serves until Ctrl-C
READS_RECORDS = ("report", "runs", "watch")  # these commands read runs in every state


def command(words: list[str], log: Path) -> Ended:
    """Run a command in a child, without input. `serve` and `watch` are interrupted after a while."""

    def work() -> None:
        from tunekit.cli import app

        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (open until the child ends)
        if words[0] in ("serve", "watch"):
            timer = Timer(5, lambda: os.kill(os.getpid(), 2))
            timer.daemon = True
            timer.start()
        try:
            app(words)
        except SystemExit as ended:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(ended.code or 0))

    return in_child(work, log)


def exit_code(name: str, run: Path, tmp_path: Path) -> tuple[int, str]:
    values = {"RUN": str(run), "PORT": str(free_port())}
    words = [values.get(word, word.replace("OUT", str(tmp_path))) for word in COMMANDS[name]]
    ended = command(words, tmp_path / "command.log")
    assert "Traceback" not in ended.output, ended.output
    return ended.code, " ".join(ended.output.split())


def slowly(names: dict[str, list[str]]) -> list[object]:
    quick = ("eval", "adapter show", "report", "runs")
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", slowly(COMMANDS))
def test_each_command_uses_a_stopped_run(name: str, run: Path, tmp_path: Path) -> None:
    code, output = exit_code(name, run, tmp_path)
    assert code == INTERRUPTED.get(name, 0), output
    assert "stopped by SIGTERM" in output or name == "audit", output
    assert ("continue it: tunekit train" in output) == (name == "report"), output


@pytest.mark.parametrize("name", slowly(COMMANDS))
def test_each_command_on_a_run_whose_best_checkpoint_was_deleted(name: str, run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step-000004")
    code, output = exit_code(name, run, tmp_path)
    assert code == INTERRUPTED.get(name, 0), output
    uses_it = name not in (*READS_RECORDS, "audit")
    assert ("step 5 of 6, stopped by SIGTERM; its best checkpoint, step 4, was deleted" in output) == uses_it, output


@pytest.mark.parametrize("name", slowly(COMMANDS))
def test_each_command_on_a_running_run(name: str, run: Path, tmp_path: Path) -> None:
    write_status(run, exit_code=None, reason="running", finished=False)
    lock = FolderLock(run)
    try:
        code, output = exit_code(name, run, tmp_path)
    finally:
        lock.release()
    if name in READS_RECORDS:
        assert code == (130 if name == "watch" else 0), output
        assert "running" in output
    else:
        assert code == 2, output
        assert "a process is training" in output
        assert (f"{run}@last" in output) == (name not in ("audit", "data rank")), output


@pytest.mark.parametrize("name", slowly(COMMANDS))
def test_each_command_on_a_run_with_only_step_0(name: str, run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    write_status(run, exit_code=143, reason="stopped by SIGTERM before the first step", finished=False)
    code, output = exit_code(name, run, tmp_path)
    assert code == (0 if name in READS_RECORDS else 2), output
    if name not in READS_RECORDS:
        assert "no complete checkpoint" in output, output
        assert f"tunekit train {os.path.relpath(run)}/recipe.yaml --resume" in output, output
