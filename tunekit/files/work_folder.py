"""Hidden folders next to an output, for unfinished files. A later command removes the folders of killed processes."""

import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunekit.files.durable import FULL, explain, is_real_file, is_real_folder, remove_tree, replace_folder, sync
from tunekit.files.lock import LOCK_NAME, is_held


@contextmanager
def work_folder(path: Path) -> Iterator[Path]:
    """A new folder next to `path`, removed after the block. Folders that killed processes left for the same `path` are
    removed first; a lock file in each folder names its process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for other in path.parent.glob(f".{glob.escape(path.name)}.part-*"):
        if is_real_folder(other) and is_real_file(other / LOCK_NAME) and not is_held(other):
            remove_tree(other)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.part-", dir=path.parent))
    try:
        (work / LOCK_NAME).write_text(f"{os.getpid()}\n")
        yield work
    finally:
        remove_tree(work)


@contextmanager
def new_path(path: Path) -> Iterator[Path]:
    """A temporary path, at which the block writes a new file or folder; it is flushed and moved to `path`.

    After a failure nothing of it remains. Raises: ResourceError that names `path` if the disk is full.
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
