"""One process per run folder: an flock on a file, which the system itself drops when the process dies.

Comes in: the folder.  Goes out: a held lock, or RunFolderError.  Next: run.py.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import weakref
from pathlib import Path

from tunekit.errors import RunFolderError
from tunekit.files.durable import effect, explain

LOCK_NAME = ".tunekit.lock"
_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderLock:
    """Held from construction until `release` or the end of the process, however it ends."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        self._number: int | None = self._take()
        _held.add(self)

    def _take(self) -> int:
        """Open and lock; again if the file was removed by the one that held it before us."""
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            number: int = effect("create", self.path, lambda flags=flags: os.open(self.path, flags, 0o666))  # type: ignore[misc]
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = _read_holder(number)
                os.close(number)
                raise self._refusal(error, holder) from error
            if _same_file(number, self.path):
                with contextlib.suppress(OSError):  # the number only serves the message of another process
                    os.ftruncate(number, 0)
                    os.pwrite(number, f"{os.getpid()}\n".encode(), 0)
                return number
            os.close(number)

    def _refusal(self, error: OSError, holder: str) -> Exception:
        folder = self.path.parent
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return RunFolderError(
                f"another process{holder} is working in {folder}", "wait for it, stop it, or choose another output.dir"
            )
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return RunFolderError(f"{folder} is on a file system without locks", "choose an output.dir on another one")
        return explain(error, "lock", self.path)

    def release(self) -> None:
        """Let another process in; the file stays, since removing it could split the lock in two."""
        if self._number is not None:
            number, self._number = self._number, None
            os.close(number)

    def remove(self) -> None:
        """Remove the file while it is still held, then let go: a folder that came to nothing is left as it was."""
        if self._number is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        self.release()


def _same_file(number: int, path: Path) -> bool:
    """Whether `path` still names the file that is open."""
    try:
        return os.path.samestat(os.fstat(number), os.lstat(path))
    except OSError:
        return False


def _read_holder(number: int) -> str:
    """ " (its id is 123)", if the lock file says so."""
    with contextlib.suppress(OSError):
        text = os.pread(number, 32, 0).decode("ascii", errors="replace").strip()
        if text.isdigit():
            return f" (its id is {text})"
    return ""


def _drop_in_child() -> None:
    """A forked child shares the lock; it must not keep it when the parent dies."""
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_drop_in_child)
