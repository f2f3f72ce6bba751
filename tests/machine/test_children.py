"""Forked children of the data room: silent, reaped, and never outliving their parent."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tunekit.machine import forks as children
from tunekit.machine.forks import Child, fork_child
from tunekit.machine.signals import StopSignals

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children are forked on Linux alone")


def started(work: Callable[[], None]) -> Child:
    child = fork_child(work)
    assert child is not None
    return child


def pid_of(child: Child) -> int:
    assert child._pid is not None
    return child._pid


def is_gone(pid: int) -> bool:
    """Whether no such process runs; a zombie of ours counts as one that does."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state[0] == "Z" and int(state[1]) != os.getpid()


def until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def fail() -> None:
    raise RuntimeError("for the child alone")


def sleep() -> None:
    time.sleep(600)


@pytest.mark.parametrize(
    ("work", "done"), [(lambda: None, True), (fail, False), (lambda: os.kill(os.getpid(), signal.SIGKILL), False)]
)
def test_the_parent_learns_how_it_ended(
    work: Callable[[], None], done: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    child = started(work)
    pid = pid_of(child)
    assert child.join() is done
    assert is_gone(pid)
    assert capfd.readouterr() == ("", "")


def test_a_child_prints_nothing_and_leaves_without_its_parents_endings(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        child = started(lambda: print("from the child", file=sys.stderr, flush=True))
        assert child.join()
    finally:
        (tmp_path / str(os.getpid())).touch()
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]
    assert capfd.readouterr() == ("", "")


def test_stopping_reaps_and_lets_it_tidy_up(tmp_path: Path) -> None:
    begun, tidied = tmp_path / "begun", tmp_path / "tidied"

    def work() -> None:
        try:
            begun.touch()
            sleep()
        finally:
            tidied.touch()

    child = started(work)
    pid = pid_of(child)
    assert until(begun.exists)
    child.stop()
    child.stop()
    assert tidied.exists()
    assert is_gone(pid)


def test_one_that_heeds_nothing_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "TIDYING_SECONDS", 0.05)

    def work() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (tmp_path / "begun").touch()
        sleep()

    child = started(work)
    pid = pid_of(child)
    assert until((tmp_path / "begun").exists)
    child.stop()
    assert is_gone(pid)


def test_one_that_stands_still_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "STALLED_SECONDS", 0.2)
    child = started(sleep)
    pid = pid_of(child)
    begun = time.monotonic()
    assert child.join() is False
    assert time.monotonic() - begun < 30
    assert is_gone(pid)


def busy(path: Path) -> None:
    end = time.process_time() + 0.5
    while time.process_time() < end:
        pass
    path.touch()


def test_one_that_works_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "STALLED_SECONDS", 0.3)
    assert started(lambda: busy(tmp_path / "done")).join()
    assert (tmp_path / "done").exists()


@pytest.fixture
def no_signal_left() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


@pytest.mark.usefixtures("no_signal_left")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_it_and_not_by_its_parents_handlers(
    number: signal.Signals, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        (tmp_path / "begun").touch()
        sleep()

    with StopSignals() as signals:
        child = started(work)
        assert until((tmp_path / "begun").exists)
        os.kill(pid_of(child), number)
        assert child.join() is False
        assert signals.requested is None
    assert capfd.readouterr() == ("", "")


def test_it_dies_with_its_parent() -> None:
    reading, writing = os.pipe()
    middle = os.fork()
    if middle == 0:
        child = fork_child(sleep)
        os.write(writing, str(pid_of(child) if child else 0).encode())
        signal.pause()
        os._exit(0)
    pid = int(os.read(reading, 20))
    os.close(reading), os.close(writing)
    assert not is_gone(pid)
    os.kill(middle, signal.SIGKILL)
    os.waitpid(middle, 0)
    try:
        assert until(lambda: is_gone(pid))
    finally:
        if not is_gone(pid):
            os.kill(pid, signal.SIGKILL)
