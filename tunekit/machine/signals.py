"""Stop signals and time limits. The first signal asks a run to save a checkpoint and stop; if there is nothing to save,
the work ends at once. A second signal ends the process at once. Time limits end foreign code that runs too long."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from tunekit.errors import Stopped

AGAIN_SECONDS = 1.0  # seconds between repeated alarms, for a block that caught an alarm
STOP_SIGNALS = tuple(  # SIGHUP exists on POSIX, SIGBREAK (Ctrl-Break, a closed window) on Windows; SLURM sends SIGUSR1
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGBREAK") if hasattr(signal, name)
)


class _StopNow(KeyboardInterrupt):
    """Raised by a stop signal, anywhere in the program, to end a block at once. It is a KeyboardInterrupt, so that
    `except Exception` does not catch it."""


class TimeUp(BaseException):
    """A block has exceeded its time limit. This is not an Exception, so that `except Exception` in foreign code does
    not catch it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """A context manager that interrupts its block after `seconds`. Outside the main thread, only lines of Python are
    interrupted, not one call that takes long. There is no limit in the main thread of a system without timer signals.

    If code in the block catches the interruption with a bare `except:`, it is interrupted again, and its result is
    discarded.
    Raises: TimeUp.
    """
    if threading.current_thread() is not threading.main_thread():
        with _traced_limit(seconds):
            yield
        return
    if not hasattr(signal, "setitimer"):
        yield
        return
    rang = False

    def ring(number: int, frame: FrameType | None) -> None:
        nonlocal rang
        rang = True
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, min(seconds, AGAIN_SECONDS))
    try:
        yield
    except Exception:
        if not rang:
            raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    if rang:
        raise TimeUp


@dataclass(frozen=True)
class _Deadline:
    """A trace function, which Python calls before each line. Raises: TimeUp after `end`, a time of time.monotonic."""

    end: float

    def __call__(self, frame: FrameType, event: str, value: object) -> _Deadline:
        if time.monotonic() > self.end:
            raise TimeUp
        return self


@contextlib.contextmanager
def _traced_limit(seconds: float) -> Iterator[None]:
    """The time limit of a thread, which gets no signals."""
    before = sys.gettrace()
    sys.settrace(_Deadline(time.monotonic() + seconds))
    try:
        yield
    finally:
        sys.settrace(before)


class StopSignals:
    """A context manager for stop signals. Inside the block, the first signal sets `requested` to its number; a second
    signal ends the process with exit code 128 + its number.

    Outside the main thread, no handler is installed, and `requested` stays None. If SIGHUP was ignored before (nohup),
    it stays ignored.
    """

    def __init__(self, *, announce: bool = True) -> None:
        self.requested: int | None = None
        self._announce = announce
        self._critical = 0
        self._at_once = False
        self._exit_code: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in STOP_SIGNALS:
            before = signal.getsignal(number)
            if number.name == "SIGHUP" and before is signal.SIG_IGN:
                continue
            self._before[number] = before
            signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = number
            if self._at_once and not self._critical:
                raise _StopNow
            if not self._at_once:
                name = signal.Signals(number).name
                self._announce_stop(f"\n{name}: saving and stopping; send the signal again to end at once\n")
        elif self._critical:
            self._exit_code = 128 + number
        else:
            os._exit(128 + number)

    def _announce_stop(self, text: str) -> None:
        """Write `text` directly to the file descriptor: a signal handler must not re-enter Python's streams."""
        if self._announce:
            with contextlib.suppress(OSError):
                os.write(2, text.encode())

    @contextlib.contextmanager
    def at_once(self, when: str) -> Iterator[None]:
        """A context manager for work that has nothing to save yet: the first signal ends the block at once. Raises:
        Stopped, with `when` in its message."""
        self._at_once = self.requested is None
        with contextlib.suppress(_StopNow):
            try:
                yield
            finally:
                self._at_once = False
        if self.requested is not None:
            raise Stopped(f"stopped by {signal.Signals(self.requested).name} {when}", self.requested)

    @contextlib.contextmanager
    def critical(self) -> Iterator[None]:
        """A context manager: no signal ends the process inside the block. If a second signal arrives, the process ends
        after the block."""
        self._critical += 1
        try:
            yield
        finally:
            self._critical -= 1
            if not self._critical and self._exit_code is not None:
                os._exit(self._exit_code)
