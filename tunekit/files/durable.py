"""Atomic, durable changes to run folders: after a kill or a power cut a file is either complete or absent.

`perform` makes all changes to a run folder, so that tests can count changes, let a change fail, or kill the process
at a change. Errors of the operating system become errors with advice for the user.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

from tunekit.basics import bytes_text
from tunekit.errors import InputError, ResourceError, RunFolderError, TunekitError, asked_path

T = TypeVar("T")
WRITE_BYTES = 8 * 1024 * 1024  # largest single write, so that a failure is noticed early
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
IS_POSIX = hasattr(os, "O_DIRECTORY")  # False on Windows, which cannot open folders, or move or remove open files
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
BROKEN = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE}


def perform(kind: str, path: Path, action: Callable[[], T]) -> T:
    """Make one change to the disk. `kind`: create, write, fsync, rename, mkdir, unlink, rmdir, truncate."""
    return action()


def explain(error: OSError, kind: str, path: Path, size_bytes: int = 0) -> TunekitError:
    """The error to show for an OSError: with exit code 4 if a resource is missing, and 2 if a folder is wrong."""
    reason, path = os.strerror(error.errno) if error.errno else str(error), asked_path(path)
    if error.errno in FULL:
        exact = f" ({size_bytes} bytes)" if size_bytes >= 1024 else ""
        wanted = f"{bytes_text(size_bytes)}{exact} for " if size_bytes else ""
        return ResourceError(
            f"no room for {wanted}{path}: {reason}{_free_text(path)}",
            "free some space, or raise the quota or the limit on file sizes; a training then continues with --resume",
        )
    if error.errno in FORBIDDEN:
        return RunFolderError(f"cannot {kind} {path}: {reason}", "choose a place that you may write to")
    if error.errno in BROKEN:
        return ResourceError(f"cannot {kind} {path}: {reason}", "the disk or the system failed; see the system's log")
    return RunFolderError(f"cannot {kind} {path}: {reason}", "choose a different path")


def _free_text(path: Path) -> str:
    """The free space at `path`, in words, if the system reports it."""
    try:
        return f" ({bytes_text(free_bytes(path))} free there)"
    except OSError:
        return ""


def free_bytes(path: Path) -> int:
    """Bytes that a user without privileges may still write at `path` (or its nearest existing parent)."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def effect(kind: str, path: Path, action: Callable[[], T], size_bytes: int = 0) -> T:
    """Call `perform`. An OSError becomes an error with advice for the user."""
    try:
        return perform(kind, path, action)
    except OSError as error:
        raise explain(error, kind, path, size_bytes) from error


def open_file(path: Path, flags: int, *, follows_links: bool = False) -> int:
    """Open a file in binary mode and return its descriptor. If the system cannot refuse links (Windows), the path is
    checked first.

    Raises: OSError, also for a link unless `follows_links`.
    """
    if not (follows_links or hasattr(os, "O_NOFOLLOW")) and os.path.islink(path):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    for name in ("O_CLOEXEC", "O_BINARY", *(() if follows_links else ("O_NOFOLLOW",))):
        flags |= getattr(os, name, 0)
    return os.open(path, flags, 0o666)


class DurableFile:
    """A new file, written piece by piece in a `with` block and made durable at the end of the block."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size_bytes = 0
        self._hash = hashlib.sha256()
        self._file = effect("create", path, lambda: os.fdopen(open_file(path, NEW_FILE), "wb", buffering=0))

    @property
    def sha256(self) -> str:
        """Hex digest of everything written so far."""
        return self._hash.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        """Write all of `data`, in as many system calls as needed."""
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
        """Flush the file to the disk, unless the block failed, and close it. Errors are reported as write errors."""
        try:
            if kind is None:
                effect("fsync", self.path, lambda: os.fsync(self._file.fileno()), self.size_bytes)
        finally:
            self._file.close()


def sync(path: Path) -> None:
    """Make a folder's names or a file's bytes durable. Windows needs no sync of folders, because NTFS has a journal."""
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
    """Make a new folder. A crash can still undo this until sync(parent) is called."""
    effect("mkdir", folder, lambda: os.mkdir(folder))


def rename(old: Path, new: Path) -> None:
    """Rename within one file system and make the new name durable."""
    effect("rename", new, lambda: os.replace(old, new))
    sync(new.parent)


def unlink(path: Path) -> None:
    """Remove one file or one symbolic link (never its target)."""
    effect("unlink", path, lambda: os.unlink(path))


def truncate(path: Path, size_bytes: int) -> None:
    """Truncate a file, never the target of a link, and make that durable."""

    def cut() -> None:
        number = open_file(path, os.O_WRONLY)
        try:
            os.ftruncate(number, size_bytes)
        finally:
            os.close(number)

    effect("truncate", path, cut)
    sync(path)


def remove_tree(folder: Path) -> None:
    """Remove a folder that tunekit created, with its contents. Symbolic links in it are removed, never followed."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            remove_tree(path)
        else:
            unlink(path)
    effect("rmdir", folder, lambda: os.rmdir(folder))


def is_real_folder(path: Path) -> bool:
    """Whether the path is a folder and not a symbolic link to one."""
    return os.path.isdir(path) and not os.path.islink(path)


def is_real_file(path: Path) -> bool:
    """Whether the path is a regular file and not a symbolic link to one."""
    return os.path.isfile(path) and not os.path.islink(path)


def is_own(path: Path) -> bool:
    """Whether the path belongs to this process's user. True on Windows, where users do not share a
    temporary folder."""
    return not hasattr(os, "getuid") or path.lstat().st_uid == os.getuid()


def temporary_name(path: Path) -> Path:
    """The temporary file for `path`: in the same folder, so that the rename stays within one file system. Containers
    that share a folder have equal process ids, so the name also depends on the machine."""
    return path.with_name(f".{path.name}.part-{os.getpid()}{zlib.crc32(socket.gethostname().encode()):010}")


def replace_folder(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`. An existing `folder` is removed only after that."""
    old = temporary.with_name(temporary.name + ".old")
    if is_real_folder(folder):
        rename(folder, old)
    rename(temporary, folder)
    if is_real_folder(old):
        remove_tree(old)
        sync(folder.parent)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[DurableFile]:
    """A file that is written completely or not at all: temporary file, fsync, rename, fsync of the folder. It has the
    mode of the file that it replaces."""
    temporary = temporary_name(path)
    if is_real_file(temporary):  # left by a killed process with the same id
        unlink(temporary)
    try:
        with DurableFile(temporary) as file:
            if is_real_file(path):
                with contextlib.suppress(OSError):  # some file systems have no modes
                    os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
            yield file
        rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder that is filled under a temporary name and then renamed, without syncs. An existing folder is not
    replaced.

    Raises: OSError, after removing the temporary folder.
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


def read_back(path: Path, size_bytes: int, read: Callable[[Path], object]) -> None:
    """Check a file that a library wrote: compare its size, and read it. Some libraries do not report a full disk.

    Raises: ResourceError if the file is incomplete or unreadable.
    """
    written, what = path.stat().st_size, ""
    if written != size_bytes:
        what = f"has {written} bytes, but {size_bytes} were written"
    else:
        try:
            read(path)
        except Exception as error:  # libraries raise errors of all kinds for a damaged file
            what = f"cannot be read back: {type(error).__name__}: {error}"
    if what:
        how = "the disk is full or failed; free some space, or choose another folder"
        raise ResourceError(f"{asked_path(path)} {what}{_free_text(path)}", how)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file with these bytes completely or not at all."""
    with atomic_file(path) as file:
        file.write(data)


def json_result(name: str | None) -> Callable[[object], None]:
    """A function that writes a verb's JSON result to the file `name` (-: standard output; None: nothing is written).
    Call this before the work, so that an unwritable file is reported early.

    Raises: RunFolderError if the file cannot be written; InputError if it would replace another file.
    """
    if name is None:
        return lambda value: None
    if name == "-":
        return lambda value: print(json_bytes(value).decode("ascii"), end="")
    path = Path(name)
    if path.is_dir():
        raise RunFolderError(f"{path} is a folder", "name a file in this folder")
    if not path.parent.is_dir():
        what = f"there is no folder {path.parent} for {path.name}"
        raise RunFolderError(what, "make the folder, or name another file")
    path = path.resolve()  # a link stays
    if path.is_file() and not _is_result(path):  # in many programs --json has no value: `doctor --json model.gguf`
        raise InputError(f"--json {name} would replace a file that may be no result of tunekit", "name a new file")
    try_to_write(path)
    return partial(write_json, path)


def _is_result(path: Path) -> bool:
    """Whether a file may be an earlier result: it is empty, or begins and ends as `json_bytes` writes it, and is not
    in a model's folder."""
    if any((path.parent / name).exists() for name in ("config.json", "adapter_config.json", "model_index.json")):
        return False
    with path.open("rb") as file:
        start = file.read(2)
        file.seek(-min(path.stat().st_size, 2), os.SEEK_END)
        return (start, file.read()) in (
            (b"", b""),
            (b"{\n", b"}\n"),
            (b"[\n", b"]\n"),
            (b"[]", b"]\n"),
            (b"{}", b"}\n"),
        )


def try_to_write(path: Path) -> None:
    """Write an empty file beside `path`, and remove it. Raises: TunekitError if no file can be written there."""
    temporary = temporary_name(path)
    write_bytes(temporary, b"")
    unlink(temporary)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, completely or not at all. An unpaired surrogate, which UTF-8 cannot encode, is escaped."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_new_text(path: Path, text: str) -> bool:
    """Write a text if the path does not exist. Returns whether the file now contains the text."""
    if not os.path.lexists(path):
        write_text(path, text)
    return is_real_file(path) and path.read_bytes() == text.encode()


def json_bytes(value: object) -> bytes:
    """A JSON document with sorted keys, in ASCII with escapes. NaN and infinity are refused."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode("ascii")


def write_json(path: Path, value: object) -> None:
    """Write a value as a JSON file, completely or not at all."""
    write_bytes(path, json_bytes(value))
