"""A lock on a disk that machines share: this machine may not see the lock of another machine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunekit.errors import RunFolderError
from tunekit.files import lock
from tunekit.files.lock import LOCK_NAME, FolderLock, is_held


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lock file of a process on node-7, whose lock this machine does not see."""
    monkeypatch.setattr(lock, "WATCHING_SECONDS", 0.2)
    path = tmp_path / LOCK_NAME
    path.write_text("4242\nnode-7\n")
    return path


@pytest.fixture
def touched(elsewhere: Path) -> Iterator[Path]:
    """The same file, touched by its process."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(0.01):
            os.utime(elsewhere)

    thread = threading.Thread(target=touch)
    thread.start()
    yield elsewhere
    ended.set()
    thread.join()


def test_a_running_process_of_another_machine_keeps_its_folder(touched: Path) -> None:
    assert is_held(touched.parent)
    with pytest.raises(RunFolderError, match=r"another process \(its id is 4242, on node-7\) is working"):
        FolderLock(touched.parent)
    assert touched.read_text() == "4242\nnode-7\n"


def test_the_lock_of_a_killed_process_of_another_machine_is_replaced(elsewhere: Path) -> None:
    os.utime(elsewhere, (1e9, 1e9))
    assert not is_held(elsewhere.parent)
    held = FolderLock(elsewhere.parent)
    assert held.lost == " (its id is 4242, on node-7)"
    assert is_held(elsewhere.parent)
    held.release()
    assert FolderLock(elsewhere.parent).lost == ""


def test_a_killed_process_whose_exit_code_nobody_has_read_holds_nothing(tmp_path: Path) -> None:
    """The state of a run in a container whose first process reaps no children."""
    code = f"from pathlib import Path; from tunekit.files.lock import FolderLock; FolderLock(Path({str(tmp_path)!r}))"
    with subprocess.Popen([sys.executable, "-c", f"{code}; print(flush=True); input()"], stdout=-1, stdin=-1) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert is_held(tmp_path)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not is_held(tmp_path)


def test_a_process_touches_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "TOUCHING_SECONDS", 0.01)
    held = FolderLock(tmp_path)
    os.utime(held.path, (1e9, 1e9))
    waiting = threading.Event()
    while held.path.stat().st_mtime < 2e9 and not is_held(tmp_path):
        waiting.wait(0.01)
    held.release()
