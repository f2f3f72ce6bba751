"""Folders for unfinished files, hidden next to an output or in the system's temporary folder. A later command removes
the folders of killed processes."""

import glob
import math
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from tunekit.errors import InputError, RunFolderError
from tunekit.files.durable import FULL, explain, is_own, is_real_file, is_real_folder, remove_tree, rename, sync
from tunekit.files.lock import LOCK_NAME, is_running, read_holder

RUN_FILES = ("plan.json", "recipe.yaml")  # a folder with both is the folder of a run
TEMPORARY_PREFIX = "tunekit-"
MARK = ".tunekit-temporary"  # only folders with this file are removed: a user's run can be named tunekit-x too
# After this time, a work folder of another machine has been left: a container often has a new name at each start.
LEFT_SECONDS = 7 * 24 * 3600.0


@contextmanager
def work_folder(path: Path) -> Iterator[Path]:
    """A new folder next to `path`, removed after the block. Folders that killed processes left for the same `path` are
    removed first; a file in each folder contains the id of its process (older versions: a lock file).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent, f".{path.name}.part-", (MARK, LOCK_NAME), LEFT_SECONDS)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.part-", dir=path.parent))
    try:
        _mark(work)
        yield work
    finally:
        remove_tree(work)


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A new folder in the system's temporary folder, removed with the object or after its `with` block. The folders of
    this user's killed processes are removed first."""
    _remove_leftovers(Path(tempfile.gettempdir()), TEMPORARY_PREFIX, (MARK,), math.inf)
    folder = tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX)
    _mark(Path(folder.name))
    return folder


def _mark(folder: Path) -> None:
    """Write the id and the machine of this process into the folder; never a half file, which another process could
    read."""
    written = folder / f"{MARK}.new"
    written.write_text(f"{os.getpid()}\n{socket.gethostname()}\n")
    written.replace(folder / MARK)


def _remove_leftovers(parent: Path, prefix: str, names: Sequence[str], seconds: float) -> None:
    """Remove the folders of this user's killed processes on this machine, and folders of other machines, which share a
    disk, after `seconds`. Folders of other users stay. A folder that cannot be removed is not an error. `names`: the
    files that name the process."""
    for folder in parent.glob(f"{glob.escape(prefix)}*"):
        mark = next((folder / name for name in names if is_real_file(folder / name)), None)
        if is_real_folder(folder) and mark and is_own(folder) and _has_ended(mark, seconds):
            shutil.rmtree(folder, ignore_errors=True)


def _has_ended(mark: Path, seconds: float) -> bool:
    """Whether the process that made a folder has ended. A process of another machine, or of one that is not stated, is
    taken to have ended `seconds` after its start."""
    with suppress(OSError, ValueError):
        process, machine = read_holder(mark)
        if machine == socket.gethostname():
            return not is_running(process, mark)
        return time.time() - mark.stat().st_mtime > seconds
    return False


@contextmanager
def new_path(path: Path) -> Iterator[Path]:
    """A temporary path, where the block writes a new file or folder. After the block, the result is flushed to the disk
    and moved to `path`.

    A failed block leaves no files behind. Raises: ResourceError that names `path` if the disk is full; RunFolderError
    if something has appeared at `path` meanwhile, which stays.
    """
    with work_folder(path) as work:
        temporary = work / path.name
        try:
            yield temporary
        except OSError as error:  # it may name the source of a copy, or no file at all
            if error.errno in FULL:
                raise explain(error, "write", path) from error
            raise
        for each in (*temporary.rglob("*"), temporary):
            if not each.is_symlink():
                sync(each)
        with suppress(OSError):
            path.rmdir()  # only an empty folder
        if not os.path.lexists(path):
            rename(temporary, path)
            return
        free = next(name for number in count(1) if not os.path.lexists(name := path.with_name(f"{path.name}.{number}")))
        rename(temporary, free)
        raise RunFolderError(f"{path} has appeared since the command started, and was not replaced", f"use {free}")


def refuse_inside(output: Path, sources: Sequence[Path] = (), key: str = "--output") -> None:
    """Refuse an output in a file or folder that the command reads, or in the folder of any run. `key`: the option that
    names the output.

    Raises: InputError.
    """
    place = output.expanduser().resolve()
    for real in (source.resolve() for source in sources):
        if place == real or real in place.parents or place in real.parents:
            raise InputError(f"{output} overlaps {real}, which is read", "name a different folder", key=key)
    for folder in place.parents:
        if all((folder / name).is_file() for name in RUN_FILES):
            raise InputError(f"{output} is in the run {folder}", "name a place outside of the run", key=key)


def check_new_folder(output: Path, sources: Sequence[Path] = (), key: str = "--output") -> Path:
    """Check a folder that a command shall write, and return its absolute path. `key`: the option that names it.

    Raises: InputError unless `output` is new or an empty folder, outside of all sources and runs.
    """
    output = Path(os.path.abspath(output.expanduser()))
    refuse_inside(output, sources, key)
    if os.path.lexists(output) and (not is_real_folder(output) or any(output.iterdir())):
        raise InputError(f"{output} exists and is not an empty folder", "name a new one", key=key)
    return output
