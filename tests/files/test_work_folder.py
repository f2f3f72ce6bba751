"""Which folders of killed processes a later command removes."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tunekit.files.lock import LOCK_NAME
from tunekit.files.work_folder import LEFT_SECONDS, MARK, work_folder


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
