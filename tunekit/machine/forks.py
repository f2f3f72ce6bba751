"""Forked children that work on the data beside this process: silent, and never outliving it.

Comes in: work to do.  Goes out: Child, to be waited for or stopped.
A child shares what its parent has imported and read, so that it starts in milliseconds.  Everything it is needed for
can be done without it: whoever forks one must go on where it dies, fails or stands still.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from types import FrameType

MOST_CORES = 8  # each child reads the whole source; a quota on processor time does not show in the affinity
STALLED_SECONDS = 10.0  # without a moment of processor time; a lock that was held in the fork is never opened
TIDYING_SECONDS = 1.0
FIRST_WAIT, LONGEST_WAIT = 0.001, 0.02  # seconds
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def usable_cores() -> int:
    """Cores that children may use; 1 where none may be forked: beside Linux, and outside the main thread."""
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return 1
    return min(len(os.sched_getaffinity(0)), MOST_CORES)


class _Ended(BaseException):
    """Raised wherever the child is, so that what it has begun to write is removed."""


def _end(_number: int, _frame: FrameType | None) -> None:
    raise _Ended


class Child:
    """A forked process, to be reaped by `join` or `stop`."""

    def __init__(self, pid: int) -> None:
        self._pid: int | None = pid
        self._used, self._since = -1.0, time.monotonic()

    @property
    def stalled(self) -> bool:
        """Whether it has had no processor time for STALLED_SECONDS, counted over the calls."""
        used, now = self._processor_seconds(), time.monotonic()
        if used != self._used:
            self._used, self._since = used, now
        return now - self._since > STALLED_SECONDS

    def join(self) -> bool:
        """Wait for its end: whether it did its work. One that stands still is killed."""
        pause = FIRST_WAIT
        while self._pid is not None:
            found, status = os.waitpid(self._pid, os.WNOHANG)
            if found:
                self._pid = None
                return status == 0
            if self.stalled:
                self.stop()
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_WAIT)
        return False

    def stop(self) -> None:
        """End and reap it, if that has not been done. It may tidy up first."""
        if self._pid is None:
            return
        os.kill(self._pid, signal.SIGTERM)  # not reaped yet, so that the number is still its own
        until = time.monotonic() + TIDYING_SECONDS
        while not os.waitpid(self._pid, os.WNOHANG)[0]:
            if time.monotonic() > until:
                os.kill(self._pid, signal.SIGKILL)
            time.sleep(FIRST_WAIT)
        self._pid = None

    def _processor_seconds(self) -> float:
        if self._pid is None:
            return 0.0
        try:
            return time.clock_gettime((~self._pid << 3) | 2)  # as clock_getcpuclockid(3) makes it
        except OSError:
            return 0.0


def fork_child(work: Callable[[], None]) -> Child | None:
    """A child that does `work`; None where the system has no room for one.

    It leaves by os._exit: nothing that its parent would do at its own end is done in it.
    """
    parent = os.getpid()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)  # none of the parent's handlers may run in the child
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child uses nothing that they lock
            pid = os.fork()
        if pid == 0:
            _be_the_child(parent, before, work)
    except OSError:
        return None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return Child(pid)


def _be_the_child(parent: int, mask: set[int | signal.Signals], work: Callable[[], None]) -> None:
    """Do the work and leave; never returns."""
    code = 1
    try:
        gc.freeze()  # looking through the parent's objects would copy their pages
        for number in _STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _end)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nothing, stream)
        sys.stdout = sys.stderr = os.fdopen(nothing, "w")
        if os.getppid() == parent:  # else it died before the kernel was asked to tell
            work()
            code = 0
    finally:
        os._exit(code)
