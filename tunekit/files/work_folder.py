"""Folders for unfinished files, hidden next to an output or in the system's temporary folder. A later command removes
the folders of killed processes."""

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunekit.files.durable import FULL, explain, is_own, is_real_file, is_real_folder, remove_tree, replace_folder, sync
from tunekit.files.lock import LOCK_NAME, is_held

TEMPORARY_PREFIX = "tunekit-"


@contextmanager
def work_folder(path: Path) -> Iterator[Path]:
    """A new folder next to `path`, removed after the block. Folders that killed processes left for the same `path` are
    removed first; a lock file in each folder contains the id of its process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent, f".{path.name}.part-")
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.part-", dir=path.parent))
    try:
        _lock(work)
        yield work
    finally:
        remove_tree(work)


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A new folder in the system's temporary folder, removed with the object or after its `with` block. The folders of
    this user's killed processes are removed first."""
    _remove_leftovers(Path(tempfile.gettempdir()), TEMPORARY_PREFIX)
    folder = tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX)
    _lock(Path(folder.name))
    return folder


def _lock(folder: Path) -> None:
    (folder / LOCK_NAME).write_text(f"{os.getpid()}\n")


def _remove_leftovers(parent: Path, prefix: str) -> None:
    """Remove the folders of this user's killed processes. Other users' folders in a shared temporary folder stay. A
    folder that cannot be removed is not an error."""
    for folder in parent.glob(f"{glob.escape(prefix)}*"):
        ours = is_real_folder(folder) and is_real_file(folder / LOCK_NAME) and is_own(folder)
        if ours and not is_held(folder):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def new_path(path: Path) -> Iterator[Path]:
    """A temporary path, where the block writes a new file or folder. After the block, the result is flushed to the disk
    and moved to `path`.

    A failed block leaves no files behind. Raises: ResourceError that names `path` if the disk is full.
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
        replace_folder(temporary, path)
