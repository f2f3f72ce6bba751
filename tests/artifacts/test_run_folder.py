"""The run folder: who may have it, what it refuses, what a kill or a full disk leaves in it."""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.faulty_disk import KILLED, FaultyDisk, count_events, in_child
from tunekit.artifacts.metrics_log import append_line
from tunekit.artifacts.run import RunFolder, is_finished
from tunekit.errors import ResourceError, RunFolderError, holds_secret, redact
from tunekit.files import durable
from tunekit.files.lock import LOCK_NAME
from tunekit.machine.environment import library_versions, read_environment
from tunekit.machine.memory import peak_host_bytes, resident_bytes
from tunekit.records import EvaluationRecord, StepRecord, bytes_text

ROOT = os.geteuid() == 0


def record(step: int, loss: float = 1.5) -> StepRecord:
    return StepRecord(step, step / 10, loss, 1e-4, 0.5, 100, 40, 0.25, 400.0, 1 << 20)


# --- who may have it -----------------------------------------------------------------------------------------------


def test_a_new_folder_is_made_with_its_parents_and_let_go(tmp_path: Path) -> None:
    place = tmp_path / "runs" / "first"
    with RunFolder.open_new(place) as run:
        assert run.path == place
        assert [entry.name for entry in place.iterdir()] == [LOCK_NAME]
    with RunFolder.open_new(place):  # nothing was trained: the folder may be used
        pass


def test_relative_and_linked_folders_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with RunFolder.open_new("here") as run:
        assert run.path == tmp_path / "here"
    (tmp_path / "link").symlink_to("here")
    with RunFolder.open_new("link"):
        pass


def test_the_new_run_of_a_linked_folder_is_written_where_the_link_points(tmp_path: Path) -> None:
    (real := tmp_path / "large_disk" / "run").mkdir(parents=True)
    (real / "plan.json").write_text("{}")
    (link := tmp_path / "run").symlink_to(real)
    with RunFolder.open_new(link, overwrite=True, warn=lambda text: None) as run:
        run.write_text("recipe.yaml", "x")
    assert link.is_symlink()
    assert sorted(entry.name for entry in real.iterdir()) == [LOCK_NAME, "recipe.yaml"]
    assert (tmp_path / "large_disk" / "run.1" / "plan.json").exists()


@pytest.mark.parametrize("sign", ["plan.json", "checkpoints"])
def test_a_folder_with_a_run_is_refused_without_resume(tmp_path: Path, sign: str) -> None:
    if sign == "checkpoints":
        (tmp_path / sign).mkdir()
    else:
        (tmp_path / sign).write_text("{}")
    with pytest.raises(RunFolderError, match=f"already holds a run .*{sign}.*--resume") as caught:
        RunFolder.open_new(tmp_path)
    assert caught.value.exit_code == 2
    assert [entry.name for entry in tmp_path.iterdir()] == [sign]
    with RunFolder.open_resume(tmp_path):
        pass


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, None])
def test_the_folder_of_a_sweep_is_refused(tmp_path: Path, options: dict[str, bool] | None) -> None:
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"already holds a sweep; choose another output\.dir"):
        RunFolder.open_resume(tmp_path) if options is None else RunFolder.open_new(tmp_path, **options)
    assert [entry.name for entry in tmp_path.iterdir()] == ["sweep.json"]


def test_an_old_run_is_moved_aside_whole_and_never_one_that_goes_on(tmp_path: Path) -> None:
    place, told = tmp_path / "run", list[str]()
    for number in range(3):
        with RunFolder.open_new(place, overwrite=True, warn=told.append) as run:
            run.write_json("plan.json", {"number": number})
            with pytest.raises(RunFolderError, match="is working in"):
                RunFolder.open_new(place, overwrite=True)
    kept = {path.name: json.loads((path / "plan.json").read_text())["number"] for path in tmp_path.iterdir()}
    assert kept == {"run.1": 0, "run.2": 1, "run": 2}
    assert told == [f"the old run in {place} is now in {place}.{number}" for number in (1, 2)]
    (place / "plan.json").unlink()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.md").write_text("by hand")
    with pytest.raises(RunFolderError, match=r"contains report\.md, which a run would overwrite"):
        RunFolder.open_new(tmp_path / "mine", overwrite=True)


def test_resume_where_nothing_is_starts_new(tmp_path: Path) -> None:
    with RunFolder.open_resume(tmp_path / "none") as run:
        run.write_text("recipe.yaml", "x: 1\n")


@pytest.mark.parametrize("name", ["recipe.yaml", "adapter", "report.md", "metrics.jsonl"])
@pytest.mark.parametrize("take", [RunFolder.open_new, RunFolder.open_resume])
def test_files_of_others_are_not_overwritten(tmp_path: Path, name: str, take: Callable[[Path], RunFolder]) -> None:
    """output.dir: . beside a recipe must not replace the user's own recipe.yaml."""
    (tmp_path / name).write_text("by hand")
    with pytest.raises(RunFolderError, match=f"contains {name}, which a run would overwrite"):
        take(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_start_killed_before_its_plan_may_be_repeated(tmp_path: Path) -> None:
    with RunFolder.open_new(tmp_path / "run") as run:
        run.write_text("recipe.yaml", "")
    with RunFolder.open_new(tmp_path / "run"):
        pass


def test_what_is_not_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="is not a folder"):
        RunFolder.open_new(tmp_path / "file")
    with pytest.raises(RunFolderError, match="Not a directory"):
        RunFolder.open_new(tmp_path / "file" / "below")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match="link to a missing file"):
        RunFolder.open_new(tmp_path / "dangling")
    with pytest.raises(RunFolderError, match="too long"):
        RunFolder.open_new(tmp_path / ("x" * 300))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path)
    with pytest.raises(RunFolderError, match="symbolic link"):
        RunFolder.open_resume(tmp_path / "run")


def test_a_second_one_is_refused_while_the_first_has_it(tmp_path: Path) -> None:
    run = RunFolder.open_new(tmp_path / "run")
    run.write_json("plan.json", {})
    for take in (RunFolder.open_new, RunFolder.open_resume):
        with pytest.raises(RunFolderError, match=f"another process .*{os.getpid()}.* is working in"):
            take(tmp_path / "run")
    run.close()
    with RunFolder.open_resume(tmp_path / "run"):
        pass


def test_tasks_of_srun_that_do_not_know_each_other_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.delenv("RANK", raising=False)
    with RunFolder.open_new(tmp_path / "run"):
        with pytest.raises(RunFolderError, match=r"srun has started 4 tasks: .* tunekit launch --on slurm"):
            RunFolder.open_new(tmp_path / "run")
        monkeypatch.setenv("RANK", "0")  # another run, which is started properly
        with pytest.raises(RunFolderError, match=r"wait for it, stop it, or choose another output\.dir"):
            RunFolder.open_new(tmp_path / "run")


TAKE = """
import sys
from tunekit.artifacts.run import RunFolder
from tunekit.errors import RunFolderError
sys.stdin.readline()
try:
    run = RunFolder.open_new(sys.argv[1])
except RunFolderError as error:
    print("refused", error, flush=True)
    sys.exit(2)
print("taken", flush=True)
sys.stdin.readline()
"""


def start_taker(place: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", TAKE, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], 60)[0], "no answer"
    return process.stdout.readline()


def test_of_three_at_once_one_has_it_and_sigkill_frees_it(tmp_path: Path) -> None:
    takers = [start_taker(tmp_path / "run") for _ in range(3)]
    try:
        for taker in takers:
            tell(taker)
        answers = [answer(taker) for taker in takers]
        assert sorted(text.split()[0] for text in answers) == ["refused", "refused", "taken"]
        assert all("another process" in text for text in answers if text.startswith("refused"))
        winner = takers[next(index for index, text in enumerate(answers) if text.startswith("taken"))]
        assert all(taker.wait(60) == 2 for taker in takers if taker is not winner)
        winner.send_signal(signal.SIGKILL)
        winner.wait(60)
        with RunFolder.open_new(tmp_path / "run"):
            pass
    finally:
        for taker in takers:
            taker.kill()
            taker.communicate()


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    run = RunFolder.open_new(tmp_path / "run")
    reading, writing = os.pipe()
    hearing, saying = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.write(saying, b"x")  # the child runs
        os.read(reading, 1)  # until the parent is done
        os._exit(0)
    os.close(reading)
    os.read(hearing, 1)
    run.close()
    with RunFolder.open_new(tmp_path / "run"):
        pass
    os.close(writing)
    os.waitpid(child, 0)


# --- checked before anything is loaded -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_folder_that_cannot_be_written_to_is_found_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """At every event of opening: an error of ours, and a folder that we made is gone again."""
    place = tmp_path / "new" / "run"
    events = count_events(lambda: RunFolder.open_new(place).close())
    shutil.rmtree(tmp_path / "new")
    assert [kind for kind, _ in events].count("fsync") >= 3
    for index in range(len(events)):
        with monkeypatch.context() as patch:
            patch.setattr(durable, "perform", FaultyDisk(index, "fail", number).perform)
            with pytest.raises((ResourceError, RunFolderError)) as caught:
                RunFolder.open_new(place)
        assert caught.value.exit_code == (4 if number in (errno.ENOSPC, errno.EDQUOT) else 2)
        assert str(tmp_path) in str(caught.value)
        assert not place.exists()
        shutil.rmtree(tmp_path / "new", ignore_errors=True)


def test_a_real_folder_without_permission() -> None:
    """In a child that gives up root's rights, where it has them."""
    with tempfile.TemporaryDirectory() as base:
        os.chmod(base, 0o755)
        place = Path(base, "run")
        place.mkdir(mode=0o555)
        child = os.fork()
        if child == 0:
            if ROOT:
                os.setuid(65534)
            try:
                RunFolder.open_new(place)
            except RunFolderError as error:
                os._exit(error.exit_code if "Permission denied" in str(error) else 99)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2


def test_too_little_space_is_refused_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder.open_new(tmp_path / "run") as run:
        run.require_free_bytes(1024)
        monkeypatch.setattr(durable, "free_bytes", lambda path: 1999)
        run.require_free_bytes(999)
        with pytest.raises(ResourceError, match=r"\(1999 bytes\) free.*\(2000 bytes\)") as caught:
            run.require_free_bytes(1000)
        assert caught.value.exit_code == 4
        monkeypatch.undo()
        with pytest.raises(ResourceError):
            run.require_free_bytes(1 << 60)


# --- files -------------------------------------------------------------------------------------------------------


def test_json_is_sorted_finite_and_readable_by_all(tmp_path: Path) -> None:
    with RunFolder.open_new(tmp_path / "run") as run:
        run.write_json("plan.json", {"b": "é\ud800", "a": [1, None]})
        assert (run.path / "plan.json").read_bytes().index(b'"a"') < (run.path / "plan.json").read_bytes().index(b'"b"')
        assert run.read_json("plan.json") == {"b": "é\ud800", "a": [1, None]}
        with pytest.raises(ValueError, match="JSON"):
            run.write_json("plan.json", {"a": float("nan")})
        assert run.read_json("plan.json") == {"b": "é\ud800", "a": [1, None]}
        assert run.read_json("absent.json") is None
        (run.path / "status.json").write_text("[" * 9999)
        with pytest.raises(RunFolderError, match=r"status\.json"):
            run.read_json("status.json")


def test_a_file_is_the_old_or_the_new_at_every_event(tmp_path: Path) -> None:
    with RunFolder.open_new(tmp_path / "run") as run:
        run.write_text("recipe.yaml", "old\n")
    place = tmp_path / "run" / "recipe.yaml"
    count = len(count_events(lambda: durable.write_text(place, "old\n")))
    assert count == 5  # create, write, fsync, rename, fsync of the folder
    for mode in ("kill", "tear"):
        for index in range(count):
            assert in_child(lambda: durable.write_text(place, "new text\n"), FaultyDisk(index, mode)) == KILLED
            assert place.read_text() in ("old\n", "new text\n")
            with RunFolder.open_resume(tmp_path / "run"):
                assert {entry.name for entry in place.parent.iterdir()} == {LOCK_NAME, "recipe.yaml"}


def test_a_written_file_keeps_its_mode_and_a_result_its_link(tmp_path: Path) -> None:
    private, link = tmp_path / "private.json", tmp_path / "link.json"
    private.touch(0o600)
    private.chmod(0o600)
    link.symlink_to(private)
    durable.json_result(str(link))({"a": 1})
    assert link.is_symlink()
    assert private.stat().st_mode & 0o777 == 0o600
    assert json.loads(private.read_text()) == {"a": 1}


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "status.json"
    durable.write_text(place, "old")
    for index in range(4):
        with monkeypatch.context() as patch:
            patch.setattr(durable, "perform", FaultyDisk(index, "fail").perform)
            with pytest.raises(ResourceError, match=r"no room for .*status\.json"):
                durable.write_text(place, "new")
        assert place.read_text() == "old"
        assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_short_writes_are_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda number, data: write(number, bytes(data)[:3]))
    durable.write_bytes(tmp_path / "x", b"0123456789")
    append_line(tmp_path / "lines", b"0123456789\n")
    monkeypatch.undo()
    assert (tmp_path / "x").read_bytes() == b"0123456789"
    assert (tmp_path / "lines").read_bytes() == b"0123456789\n"


def test_a_process_of_another_container_with_the_same_id_writes_another_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would remove the unfinished file, and this process would then rename the other's unfinished file."""
    place = tmp_path / "x"
    with durable.atomic_file(place) as file:
        file.write(b"one")
        with monkeypatch.context() as patch:
            patch.setattr("socket.gethostname", lambda: "pod-2")
            with durable.atomic_file(place) as other:
                other.write(b"two")
    assert place.read_bytes() == b"one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_leftovers_are_tidied_only_if_ours(tmp_path: Path) -> None:
    place = tmp_path / "run"
    RunFolder.open_new(place).close()
    ours = [".recipe.yaml.part-12", ".plan.json.part-3"]
    others = [".novel.txt.part-12", ".recipe.yaml.part-x", "recipe.yaml.part-12"]
    for name in (*ours, *others):
        (place / name).write_text("")
    (place / ".status.json.part-1").symlink_to(tmp_path)
    for name, inside in (
        (".adapter.part-5", "tunekit.json"),
        (".adapter.part-6", "thesis.txt"),
        (".model.part-7", "x"),
    ):
        (place / name).mkdir()
        (place / name / inside).write_text("")
    (place / ".adapter.part-8").symlink_to(place / ".adapter.part-6")
    RunFolder.open_new(place).close()
    left = {entry.name for entry in place.iterdir()}
    assert left == {
        LOCK_NAME,
        *others,
        ".status.json.part-1",
        ".adapter.part-6",
        ".model.part-7",
        ".adapter.part-8",
    }
    assert (place / ".adapter.part-6" / "thesis.txt").exists()


@pytest.mark.parametrize("stands", [True, False])
def test_an_adapter_that_had_stepped_aside_comes_back_unless_the_new_one_stands(tmp_path: Path, stands: bool) -> None:
    place = tmp_path / "run"
    RunFolder.open_new(place).close()
    (place / ".adapter.part-5.old").mkdir()
    (place / ".adapter.part-5.old" / "adapter_config.json").write_text("old")
    if stands:
        (place / "adapter").mkdir()
        (place / "adapter" / "adapter_config.json").write_text("new")
    RunFolder.open_resume(place).close()
    assert {entry.name for entry in place.iterdir()} == {LOCK_NAME, "adapter"}
    assert (place / "adapter" / "adapter_config.json").read_text() == ("new" if stands else "old")


def test_status_says_whether_a_run_ended_well(tmp_path: Path) -> None:
    assert not is_finished(tmp_path / "none")
    with RunFolder.open_new(tmp_path / "run") as run:
        run.status(None, "running")
        assert not is_finished(run.path)
        run.status(3, "loss is not finite; token hf_abcdefghijklmnop")
        status = {"exit_code": 3, "reason": "loss is not finite; token [secret]", "finished": False}
        assert run.read_json("status.json") == status
        assert not is_finished(run.path)
        run.status(0, "stopped_by_time")
        assert not is_finished(run.path)
        run.status(0, "finished", finished=True)
        assert is_finished(run.path)
        run.write_json("status.json", {"exit_code": 0, "reason": "finished"})  # of an older version
        assert is_finished(run.path)


def test_secrets_are_taken_out() -> None:
    assert redact("https://alice:pw1@host/x hf_AbCdEfGhIjKl") == "https://[secret]@host/x [secret]"
    assert redact("hf_ is a prefix; a@b") == "hf_ is a prefix; a@b"
    assert redact("glpat-AbCdEfGh12, sk-proj-AbCd_EfGh-1") == "[secret], [secret]"
    key = "aB3_dEf-gH1jK2lM3nO4pQ5"
    secrets = [f"{name}-{key}" for name in ("sk-proj", "sk-ant-api03", "sk-or-v1", "sk-svcacct", "glpat")]
    secrets += [f"AKIA{'B2' * 8}", "xoxb-123456789012-abc", f"AIza{'b' * 35}", "-----BEGIN RSA PRIVATE KEY"]
    assert [(redact(text), holds_secret(text)) for text in secrets] == [("[secret]", True)] * len(secrets)
    for text in ("hf_checkpoints_of_may", "http://localhost:8080/a@v2", "https://github.com/a/b:c@main"):
        assert not holds_secret(text), text
    assert redact("https://bob:p@s/s@host/x") == "https://[secret]@host/x"


# --- metrics.jsonl -------------------------------------------------------------------------------------------------


def test_metrics_come_back_and_are_cut_to_a_step(tmp_path: Path) -> None:
    run = RunFolder.open_new(tmp_path / "run")
    assert run.read_metrics() == []
    assert run.truncate_metrics(0) == 0
    for step in (1, 2, 3):
        run.append_metrics(record(step))
    run.append_metrics(EvaluationRecord(3, {"loss": 0.75}))
    run.append_metrics(record(4))
    assert [entry["step"] for entry in run.read_metrics()] == [1, 2, 3, 3, 4]
    assert run.read_metrics()[3] == {"step": 3, "eval": {"loss": 0.75}}
    assert run.read_metrics()[0]["loss"] == 1.5
    assert run.truncate_metrics(9) == 5
    assert run.truncate_metrics(3) == 4
    run.append_metrics(record(4, loss=1.25))
    assert run.read_metrics()[-1]["loss"] == 1.25
    assert run.truncate_metrics(0) == 0
    assert run.metrics_path.read_bytes() == b""


def test_a_link_in_place_of_the_metrics_is_not_truncated(tmp_path: Path) -> None:
    run, private = RunFolder.open_new(tmp_path / "run"), tmp_path / "token"
    private.write_text("hf_token")
    run.metrics_path.symlink_to(private)
    with pytest.raises(RunFolderError, match=r"cannot truncate .*metrics\.jsonl"):
        run.truncate_metrics(3)
    assert private.read_text() == "hf_token"


def test_a_torn_last_line_is_passed_over_and_cut_off(tmp_path: Path) -> None:
    run = RunFolder.open_new(tmp_path / "run")
    for step in (1, 2):
        run.append_metrics(record(step))
    whole = run.metrics_path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        run.metrics_path.write_bytes(whole[:cut])
        assert [entry["step"] for entry in run.read_metrics()] == [1]
        run.truncate_metrics(2)
        assert run.metrics_path.read_bytes() == whole[:first]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    run = RunFolder.open_new(tmp_path / "run")
    run.append_metrics(record(1))
    with run.metrics_path.open("a") as file:
        file.write("{oops\n")
    run.append_metrics(record(2))
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl:2: this line is not a metrics record"):
        run.read_metrics()


def test_a_record_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    run = RunFolder.open_new(tmp_path / "run")
    with pytest.raises(ValueError, match="JSON"):
        run.append_metrics(record(1, loss=float("nan")))
    assert not run.metrics_path.exists()


def test_a_full_disk_stops_at_the_log_and_tears_no_line(tmp_path: Path) -> None:
    """The system's own limit on a file's size cuts a line; it is taken back, and the run stops with exit code 4."""
    run = RunFolder.open_new(tmp_path / "run")
    run.append_metrics(record(1))
    size = run.metrics_path.stat().st_size
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, size + 20))
        try:
            run.append_metrics(record(2))
        except ResourceError as error:
            os._exit(error.exit_code if "metrics.jsonl" in str(error) else 99)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
    assert [entry["step"] for entry in run.read_metrics()] == [1]
    assert run.metrics_path.stat().st_size == size


# --- environment and memory ----------------------------------------------------------------------------------------


def test_environment_names_versions_and_machine_but_no_person(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    monkeypatch.setenv("USER", "alice-in-wonderland")
    value = read_environment(device="cpu")
    text = json.dumps(value, allow_nan=False)
    assert value["versions"]["torch"] == library_versions()["torch"]
    assert {"tunekit", "transformers", "bitsandbytes", "accelerate"} <= set(value["versions"])
    assert value["threads"] >= 1
    assert value["cpu"]
    assert "secretsecret" not in text
    assert "alice-in-wonderland" not in text
    assert os.path.expanduser("~") not in text or os.path.expanduser("~") == "/"


@pytest.mark.drawn
def test_versions_are_read_without_importing() -> None:
    code = (
        "import sys; from tunekit.machine.environment import library_versions; v = library_versions();"
        "sys.exit('bitsandbytes' in sys.modules or 'transformers' in sys.modules or 'bitsandbytes' not in v)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_host_memory_sees_an_allocation() -> None:
    peak, resident = peak_host_bytes(), resident_bytes()
    assert peak + (1 << 20) > resident > 0
    block = bytearray(peak - resident + (64 << 20))
    block[::4096] = b"x" * len(block[::4096])
    assert resident_bytes() > resident + (32 << 20)
    del block
    assert peak_host_bytes() > peak + (32 << 20)


def test_the_peak_without_proc(tmp_path: Path) -> None:
    assert peak_host_bytes(tmp_path / "absent") > 1 << 20


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (1 << 30, "1.0 GiB"), (1 << 50, "1024.0 TiB")],
)
def test_bytes_for_a_person(count: int, text: str) -> None:
    assert bytes_text(count) == text


def test_opening_imports_no_torch() -> None:
    """Refusals come before anything heavy is imported."""
    code = "import sys; import tunekit.artifacts.run, tunekit.machine.signals; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
