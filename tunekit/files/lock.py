"""A lock that allows one process per folder. The system releases it when the process ends, even by a kill.

Not every network disk shows the lock to other machines. Therefore the holder also writes its id and its machine into
the lock file, and touches the file regularly. A process on another machine watches whether the file is touched.
"""

import contextlib
import errno
import os
import socket
import threading
import time
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from tunekit.errors import RunFolderError
from tunekit.files.durable import IS_POSIX, explain, perform

LOCK_NAME = ".tunekit.lock"
TOUCHING_SECONDS = 10.0
WATCHING_SECONDS = 30.0  # without a touch for so long, the process on the other machine has ended


def is_held(folder: Path) -> bool:
    """Whether the process that last locked the folder is still running. This does not try to lock the folder."""
    path = folder / LOCK_NAME
    try:
        process, machine = read_holder(path)
        if machine not in ("", socket.gethostname()):
            return time.time() - path.stat().st_mtime < WATCHING_SECONDS
        return is_running(process, path)
    except PermissionError:  # Windows lets no other process read a locked file
        return not IS_POSIX
    except (OSError, ValueError):
        return False


def is_running(process: int, path: Path) -> bool:
    """Whether the process that wrote the file is running on this machine; a later process can have the same id.

    Raises: OSError if the file cannot be read."""
    try:
        writer = psutil.Process(process)
        # a killed process stays a zombie until its parent has read its exit code
        return bool(writer.create_time() <= path.stat().st_mtime) and writer.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def read_holder(path: Path) -> tuple[int, str]:
    """The id and the machine of the process that holds a lock; no machine in a lock of an older tunekit.

    Raises: OSError; ValueError for a lock that was released.
    """
    process, _, machine = path.read_text().strip().partition("\n")
    return int(process), machine


class FolderLock:
    """A lock that is held from construction until `release` or the end of the process. Forked children do not hold it.
    `lost`: the process of another machine that held the lock and has ended; empty if there is none."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        self.lost = ""
        self._released = threading.Event()
        self._lock = FileLock(self.path, thread_local=False, fallback_to_soft=False)
        try:
            perform("create", self.path, lambda: self._lock.acquire(blocking=False))
        except Timeout as error:
            raise _taken(folder, self._holder()) from error
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                what = f"{folder} is on a file system without locks"
                raise RunFolderError(what, "choose an output.dir on another file system") from error
            raise explain(error, "lock", self.path) from error
        self._watch_other_machine(folder)
        with contextlib.suppress(OSError):  # other processes read it
            self.path.write_text(f"{os.getpid()}\n{socket.gethostname()}\n")
        threading.Thread(target=self._touch, daemon=True).start()

    def _holder(self) -> str:
        """ " (its id is 123, on node-1)" for a message, if the lock file contains the process."""
        with contextlib.suppress(OSError, ValueError):
            process, machine = read_holder(self.path)
            return f" (its id is {process}, on {machine})" if machine else f" (its id is {process})"
        return ""

    def _watch_other_machine(self, folder: Path) -> None:
        """If a process of another machine has not released the lock, watch whether it still touches the file. Sets
        `lost` if it has ended.

        Raises: RunFolderError if it is running: the file system does not show its lock.
        """
        with contextlib.suppress(OSError, ValueError):
            if read_holder(self.path)[1] in ("", socket.gethostname()):
                return
            touched, deadline = self._touched(), time.monotonic() + WATCHING_SECONDS
            while time.monotonic() < deadline:
                if self._touched() != touched:
                    self._lock.release()
                    raise _taken(folder, self._holder())
                time.sleep(WATCHING_SECONDS / 100)
            self.lost = self._holder()

    def _touched(self) -> float:
        """The time of the last touch. A network disk answers with new times only after the file was opened."""
        with self.path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime

    def _touch(self) -> None:
        while not self._released.wait(TOUCHING_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        """Release the lock. The file stays, because removing it could allow two locks."""
        self._released.set()
        if self._lock.is_locked:
            with contextlib.suppress(OSError):
                self.path.write_text("")  # for `is_held`
        self._lock.release()

    def remove(self) -> None:
        """Remove the lock file and release the lock, so that a failed start leaves no trace. On Windows the file is
        removed after the release."""
        self._released.set()
        with contextlib.suppress(OSError):
            self.path.unlink()
        self._lock.release()
        if not IS_POSIX:
            with contextlib.suppress(OSError):
                self.path.unlink()


def _taken(folder: Path, holder: str) -> RunFolderError:
    what, how = f"another process{holder} is working in {folder}", "wait for it, stop it, or choose another output.dir"
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and "RANK" not in os.environ:
        how = (
            f"srun has started {tasks} tasks: to let them train together, submit the file of tunekit launch --on slurm"
        )
    return RunFolderError(what, how)
