"""Stop signals: the first asks, the second ends, and neither does so inside a critical section."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tunekit.artifacts.checkpoint import load_newest, save_checkpoint
from tunekit.artifacts.run import RunFolder
from tunekit.errors import Stopped
from tunekit.machine.signals import STOP_SIGNALS, StopSignals


def send(number: int) -> None:
    """To this process; Python runs the handler before the next line."""
    signal.raise_signal(number)


def child_status(work: Callable[[], None]) -> int:
    """Exit status of `work` in a forked child."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(99)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_is_noted_and_handlers_come_back(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    before = {each: signal.getsignal(each) for each in STOP_SIGNALS}
    with StopSignals() as signals:
        assert signals.requested is None
        send(number)
        assert signals.requested == number
    assert {each: signal.getsignal(each) for each in STOP_SIGNALS} == before
    assert f"{signal.Signals(number).name}: saving and stopping" in capfd.readouterr().err


def test_other_ranks_say_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignals(announce=False) as signals:
        send(signal.SIGTERM)
        assert signals.requested == signal.SIGTERM
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("first", STOP_SIGNALS)
@pytest.mark.parametrize("second", STOP_SIGNALS)
def test_the_second_ends_at_once(first: int, second: int) -> None:
    def work() -> None:
        with StopSignals(announce=False):
            send(first)
            try:
                send(second)
            finally:
                os._exit(98)  # must not be reached

    assert child_status(work) == 128 + second


def test_a_critical_section_is_finished_first(tmp_path: Path) -> None:
    def work() -> None:
        with StopSignals(announce=False) as signals:
            with signals.critical():
                with signals.critical():
                    send(signal.SIGINT)
                    send(signal.SIGTERM)
                (tmp_path / "inner").touch()
            (tmp_path / "outer").touch()

    assert child_status(work) == 128 + signal.SIGTERM
    assert (tmp_path / "inner").exists()
    assert not (tmp_path / "outer").exists()


def test_one_signal_in_a_critical_section_only_asks() -> None:
    def work() -> None:
        with StopSignals(announce=False) as signals:
            with signals.critical():
                send(signal.SIGHUP)
            os._exit(7 if signals.requested == signal.SIGHUP else 8)

    assert child_status(work) == 7


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_where_nothing_is_there_to_save_the_first_ends_the_block(number: int) -> None:
    went_on: list[str] = []

    def work(signals: StopSignals) -> None:
        with signals.at_once("before it began"):
            try:
                send(number)
            except Exception:  # what a library catches is not the end of the stop
                went_on.append("caught")
            went_on.append("went on")

    with StopSignals(announce=False) as signals:
        with pytest.raises(Stopped, match=f"stopped by {signal.Signals(number).name} before it began") as stopped:
            work(signals)
        assert stopped.value.exit_code == 128 + number
        assert went_on == []
        with pytest.raises(Stopped), signals.at_once("either"):  # asked for already
            pass


def test_after_the_block_the_first_only_asks() -> None:
    with StopSignals(announce=False) as signals:
        with signals.at_once("before it began"):
            pass
        send(signal.SIGTERM)
        assert signals.requested == signal.SIGTERM


def test_a_save_under_fire_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two signals in the middle of a save: the save ends, then the process does, and the checkpoint is good."""
    place = tmp_path / "run"

    def work() -> None:
        fsync = os.fsync

        def noisy(number: int) -> None:
            send(signal.SIGTERM)
            fsync(number)

        run = RunFolder.open_new(place)
        with StopSignals(announce=False) as signals, signals.critical():
            os.fsync = noisy
            save_checkpoint(run, 1, {"w": torch.ones(3)}, {}, keep=1)

    assert child_status(work) == 128 + signal.SIGTERM
    with RunFolder.open_resume(place) as run:
        checkpoint = load_newest(run)
    assert checkpoint is not None
    assert torch.equal(checkpoint.tensors["w"], torch.ones(3))


def test_outside_the_main_thread_nothing_happens() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with StopSignals() as signals, signals.critical():
            seen.append((signals.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


def test_nohup_stays_nohup() -> None:
    code = (
        "import os, signal; from tunekit.machine.signals import StopSignals\n"
        "with StopSignals() as s:\n"
        "    os.kill(os.getpid(), signal.SIGHUP); os.kill(os.getpid(), signal.SIGHUP); print(s.requested)"
    )
    done = subprocess.run(["nohup", sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"


def test_a_handler_of_the_caller_is_put_back() -> None:
    def mine(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with StopSignals(announce=False), StopSignals(announce=False) as inner:
            send(signal.SIGTERM)
            assert inner.requested == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
