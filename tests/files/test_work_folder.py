"""Which folders of killed processes a later command removes."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.faulty_disk import FaultyDisk
from tunekit.artifacts.run import RunFolder
from tunekit.errors import ResourceError, exit_message
from tunekit.files import durable
from tunekit.files.lock import LOCK_NAME
from tunekit.files.work_folder import LEFT_SECONDS, MARK, new_path, work_folder
from tunekit.model.storage.model_folder import atomic_model_folder


def write_new(path: Path) -> None:
    with new_path(path) as partial:
        partial.mkdir()
        durable.write_text(partial / "config.json", "{}")


def write_other_file(path: Path) -> None:
    with work_folder(path) as work:
        durable.write_text(work / "base.gguf", "a file that the user does not know")


def write_model(path: Path) -> None:
    with atomic_model_folder(path) as staging:
        durable.write_text(staging / "config.json", "{}")


def open_new_run(path: Path) -> None:
    path.mkdir()
    RunFolder.open_new(path)


@pytest.mark.parametrize(
    ("write", "named"),
    [
        (durable.write_text, "out"),
        (write_new, "out/config.json"),
        (write_other_file, "out"),
        (write_model, "out/config.json"),
        (open_new_run, "out/recipe.yaml"),
    ],
)
def test_errors_name_the_file_that_the_user_asked_for(
    write: Callable[..., None], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the hidden file or folder in which it is written."""
    monkeypatch.setattr(durable, "perform", FaultyDisk(0, "fail").perform)
    words = ["text"] if write is durable.write_text else []
    with pytest.raises(ResourceError, match=f"no room for {tmp_path}/{named}: ") as caught:
        write(tmp_path / "out", *words)
    assert ".part-" not in str(caught.value)


def test_errors_of_libraries_and_incomplete_files_name_it_too(tmp_path: Path) -> None:
    with new_path(tmp_path / "out") as partial:
        partial.write_text("cut")
        with pytest.raises(ResourceError, match=f"^{tmp_path}/out has 3 bytes, but 9 were written"):
            durable.read_back(partial, 9, Path.read_text)
        message, _ = exit_message(OSError(errno.EACCES, "Permission denied", str(partial)))
        assert message == f"{tmp_path}/out: Permission denied; check the path and its permissions"
    assert (
        str(tmp_path / ".notes.part-1") in exit_message(OSError(errno.EACCES, "", str(tmp_path / ".notes.part-1")))[0]
    )


def test_old_work_folders_of_other_machines_and_of_older_versions_are_removed(tmp_path: Path) -> None:
    """A container often has a new name at each start, and a killed merge leaves gigabytes next to its output."""
    contents = {MARK: "1\nanother-machine\n", LOCK_NAME: "1\n"}  # older versions wrote a lock without a machine
    for name, text in contents.items():
        for age in ("old", "new"):
            folder = tmp_path / f".out.part-{age}{name}"
            folder.mkdir()
            (folder / name).write_text(text)
            written = time.time() - (LEFT_SECONDS + 60 if age == "old" else 0)
            os.utime(folder / name, (written, written))
    (tmp_path / ".out.part-mine").mkdir()
    with work_folder(tmp_path / "out") as work:
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {work.name, ".out.part-mine", *(f".out.part-new{name}" for name in contents)}
