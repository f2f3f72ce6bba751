"""A lock that allows one process per folder. The system releases it when the process ends, even by a kill."""

import contextlib
import errno
import os
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from tunekit.errors import RunFolderError
from tunekit.files.durable import IS_POSIX, explain, perform

LOCK_NAME = ".tunekit.lock"


def is_held(folder: Path) -> bool:
    """Whether the process that last locked the folder is still running. This does not try to lock the folder."""
    path = folder / LOCK_NAME
    try:
        return bool(psutil.Process(int(path.read_text())).create_time() <= path.stat().st_mtime)
    except PermissionError:  # Windows lets no other process read a locked file
        return not IS_POSIX
    except (OSError, ValueError, psutil.Error):
        return False


class FolderLock:
    """A lock that is held from construction until `release` or the end of the process. Forked children do not hold
    it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        self._lock = FileLock(self.path, thread_local=False, fallback_to_soft=False)
        try:
            perform("create", self.path, lambda: self._lock.acquire(blocking=False))
        except Timeout as error:
            what = f"another process{self._holder()} is working in {folder}"
            raise RunFolderError(what, "wait for it, stop it, or choose another output.dir") from error
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                what = f"{folder} is on a file system without locks"
                raise RunFolderError(what, "choose an output.dir on another file system") from error
            raise explain(error, "lock", self.path) from error
        with contextlib.suppress(OSError):  # the id appears in the message of another process
            self.path.write_text(f"{os.getpid()}\n")

    def _holder(self) -> str:
        """ " (its id is 123)" for a message, if the lock file contains the id of the process."""
        with contextlib.suppress(OSError, ValueError):
            return f" (its id is {int(self.path.read_text())})"
        return ""

    def release(self) -> None:
        """Release the lock. The file stays, because removing it could allow two locks."""
        if self._lock.is_locked:
            with contextlib.suppress(OSError):
                self.path.write_text("")  # for `is_held`
        self._lock.release()

    def remove(self) -> None:
        """Remove the lock file and release the lock, so that a failed start leaves no trace. On Windows the file is
        removed after the release."""
        with contextlib.suppress(OSError):
            self.path.unlink()
        self._lock.release()
        if not IS_POSIX:
            with contextlib.suppress(OSError):
                self.path.unlink()
