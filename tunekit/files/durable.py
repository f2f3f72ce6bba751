"""Every change tunekit makes to a run folder: after a kill or a power cut a file is there whole or not at all.

Comes in: paths and bytes.  Goes out: durable files; the operating system's refusals as errors a user can act on.  What
touches a run folder passes through `perform`, so that a test can count these effects, make one fail, or die at one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

from tunekit.errors import ResourceError, RunFolderError, TunekitError
from tunekit.records import bytes_text

T = TypeVar("T")
WRITE_BYTES = 8 * 1024 * 1024  # largest single write, so that a failure is noticed early
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
IS_POSIX = hasattr(os, "O_DIRECTORY")  # else Windows: it opens no folder, and moves and removes nothing that is open
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
BROKEN = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE}


def perform(kind: str, path: Path, action: Callable[[], T]) -> T:
    """Do one thing to the disk. `kind`: create, write, fsync, rename, mkdir, unlink, rmdir, truncate."""
    return action()


def explain(error: OSError, kind: str, path: Path, size_bytes: int = 0) -> TunekitError:
    """The error a user meets for an operating system's refusal: exit code 4 for a resource, 2 for a wrong folder."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in FULL:
        wanted = f"{bytes_text(size_bytes)} ({size_bytes} bytes) for " if size_bytes else ""
        return ResourceError(
            f"no room for {wanted}{path}: {reason}{_free_text(path)}",
            "free some space or raise the limit; a run can then continue with --resume",
        )
    if error.errno in FORBIDDEN:
        return RunFolderError(f"cannot {kind} {path}: {reason}", "choose a place that you may write to")
    if error.errno in BROKEN:
        return ResourceError(f"cannot {kind} {path}: {reason}", "the disk or the system failed; see its log")
    return RunFolderError(f"cannot {kind} {path}: {reason}")


def _free_text(path: Path) -> str:
    """How much is free where `path` lies, if that can be asked."""
    try:
        return f" ({bytes_text(free_bytes(path))} free there)"
    except OSError:
        return ""


def free_bytes(path: Path) -> int:
    """Bytes a user without privileges may still write where `path` lies (its nearest existing parent)."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def effect(kind: str, path: Path, action: Callable[[], T], size_bytes: int = 0) -> T:
    """`perform`, with an OSError turned into the error a user meets."""
    try:
        return perform(kind, path, action)
    except OSError as error:
        raise explain(error, kind, path, size_bytes) from error


def open_file(path: Path, flags: int, *, follows_links: bool = False) -> int:
    """The number of a file that is opened for bytes. Where the system cannot refuse a link (Windows), it is looked for.

    Raises: OSError, also for a link unless `follows_links`.
    """
    if not (follows_links or hasattr(os, "O_NOFOLLOW")) and os.path.islink(path):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    for name in ("O_CLOEXEC", "O_BINARY", *(() if follows_links else ("O_NOFOLLOW",))):
        flags |= getattr(os, name, 0)
    return os.open(path, flags, 0o666)


class DurableFile:
    """A new file, written piece by piece inside a `with` block that makes it durable. Knows its size and sha256."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size_bytes = 0
        self._hash = hashlib.sha256()
        self._file = effect("create", path, lambda: os.fdopen(open_file(path, NEW_FILE), "wb", buffering=0))

    @property
    def sha256(self) -> str:
        """Hex digest of everything written."""
        return self._hash.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        """Write all of `data`, however many calls the system needs."""
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")  # an empty one cannot be cast
        self._hash.update(view)
        done = 0
        while done < len(view):
            piece = view[done : done + WRITE_BYTES]
            done += effect("write", self.path, partial(self._file.write, piece), len(view))
        self.size_bytes += len(view)

    def __enter__(self) -> DurableFile:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Close, after a flush to the disk itself unless the block failed; errors of either are errors of the write."""
        try:
            if kind is None:
                effect("fsync", self.path, lambda: os.fsync(self._file.fileno()), self.size_bytes)
        finally:
            self._file.close()


def sync(path: Path) -> None:
    """Make durable the names in a folder (Windows: NTFS's own journal), or the present bytes of a file."""
    if not IS_POSIX and path.is_dir():
        return

    def flush() -> None:
        number = open_file(path, os.O_RDONLY if IS_POSIX else os.O_RDWR, follows_links=True)
        try:
            os.fsync(number)
        except OSError as error:  # some network file systems cannot flush a folder, and need not
            if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
                raise
        finally:
            os.close(number)

    effect("fsync", path, flush)


def make_folder(folder: Path) -> None:
    """A new folder; its name is durable only after sync(parent)."""
    effect("mkdir", folder, lambda: os.mkdir(folder))


def rename(old: Path, new: Path) -> None:
    """Rename within one file system and make the new name durable."""
    effect("rename", new, lambda: os.replace(old, new))
    sync(new.parent)


def unlink(path: Path) -> None:
    """Remove one file or one symbolic link (never what it points to)."""
    effect("unlink", path, lambda: os.unlink(path))


def truncate(path: Path, size_bytes: int) -> None:
    """Cut a file and make the cut durable."""
    effect("truncate", path, lambda: os.truncate(path, size_bytes))
    sync(path)


def remove_tree(folder: Path) -> None:
    """Remove a folder of ours with all it holds; symbolic links in it are removed, never followed."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            remove_tree(path)
        else:
            unlink(path)
    effect("rmdir", folder, lambda: os.rmdir(folder))


def is_real_folder(path: Path) -> bool:
    """A folder and not a symbolic link to one."""
    return os.path.isdir(path) and not os.path.islink(path)


def is_real_file(path: Path) -> bool:
    """A regular file and not a symbolic link to one."""
    return os.path.isfile(path) and not os.path.islink(path)


def temporary_name(path: Path) -> Path:
    """Where `path` is written before it is renamed into place: beside it, so never on another file system."""
    return path.with_name(f".{path.name}.part-{os.getpid()}")


def replace_folder(temporary: Path, folder: Path) -> None:
    """Rename into place; what stood there goes only after the new folder stands."""
    old = temporary.with_name(temporary.name + ".old")
    if is_real_folder(folder):
        rename(folder, old)
    rename(temporary, folder)
    if is_real_folder(old):
        remove_tree(old)
        sync(folder.parent)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[DurableFile]:
    """A file written whole or not at all: temporary file beside it, fsync, rename, fsync of the folder."""
    temporary = temporary_name(path)
    if is_real_file(temporary):  # of a killed process that had our id
        unlink(temporary)
    try:
        with DurableFile(temporary) as file:
            yield file
        rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder that can be made again: filled beside its place and renamed into it; one that is there already stays.

    Raises: OSError; nothing is left behind then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield work
        os.rename(work, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process was faster
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    """`whole_file` of these bytes."""
    with whole_file(path) as file:
        file.write(data)


def json_result(name: str | None) -> Callable[[object], None]:
    """What writes a verb's result, as JSON, to the file that is named, if one is; - is standard output. Asked for
    before the work.

    Raises: RunFolderError where it could not be written.
    """
    if name is None:
        return lambda value: None
    if name == "-":
        return lambda value: print(json_bytes(value).decode("ascii"), end="")
    path = Path(name)
    if path.is_dir():
        raise RunFolderError(f"{path} is a folder", "name a file")
    if not path.parent.is_dir():
        raise RunFolderError(f"there is no folder {path.parent} for {path.name}", "make it, or name another file")
    temporary = temporary_name(path)
    write_bytes(temporary, b"")
    unlink(temporary)
    return partial(write_json, path)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` in UTF-8; half a surrogate pair, which UTF-8 cannot hold, is spelled out."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_new_text(path: Path, text: str) -> bool:
    """`write_text` where no file stands yet; whether the text stands there now."""
    if not os.path.lexists(path):
        write_text(path, text)
    return is_real_file(path) and path.read_bytes() == text.encode()


def json_bytes(value: object) -> bytes:
    """One JSON document: sorted keys, other letters escaped (also half a surrogate pair), never NaN or Infinity."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode("ascii")


def write_json(path: Path, value: object) -> None:
    """`write_bytes` of `json_bytes`."""
    write_bytes(path, json_bytes(value))
