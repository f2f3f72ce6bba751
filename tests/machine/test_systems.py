"""The commands on Windows and on a Mac, as far as Linux can show them: what those systems lack is hidden."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.train_case import result_bytes, write_recipe
from tunekit.files import durable, lock
from tunekit.files.lock import LOCK_NAME, is_held

CODES = {"validate": 0, "plan": 0, "train": 0, "Ctrl-C": 130, "resume": 0, "overwrite": 0}
CODES |= {"eval": 0, "merge": 0, "chat": 0, "report": 0, "runs": 0}


@pytest.mark.slow
@pytest.mark.parametrize("system", ["windows", "mac"])
def test_every_command_without_what_the_system_lacks(system: str, tiny_llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe", tiny_llama)
    words = [sys.executable, "-m", "tests.support.other_system", system, str(recipe), str(tmp_path)]
    ended = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1]) == CODES, ended.stdout + ended.stderr
    assert result_bytes(tmp_path / "stopped") == result_bytes(tmp_path / "whole")
    assert (tmp_path / "whole.1" / "report.json").is_file()


PARTS = """
import sys
from pathlib import Path
from tests.support.other_system import hide
hide("windows")
from tunekit.files import durable
from tunekit.machine.signals import STOP_SIGNALS, StopSignals, time_limit
folder = Path(sys.argv[1])
with StopSignals(), time_limit(1.0):
    for text in ("one\\n", "two\\n"):
        durable.write_text(folder / "file", text)
    durable.truncate(folder / "file", 2)
durable.sync(folder)
print([number.name for number in STOP_SIGNALS], (folder / "file").read_bytes(), durable.IS_POSIX)
"""


def test_files_and_signals_of_windows(tmp_path: Path) -> None:
    words = [sys.executable, "-c", PARTS, str(tmp_path)]
    ended = subprocess.run(words, capture_output=True, text=True, env=dict(os.environ))
    # SIGBREAK has another name here
    assert ended.stdout == "['SIGINT', 'SIGTERM', 'SIGTTIN'] b'tw' False\n", ended.stderr


def test_a_link_is_looked_for_where_the_system_cannot_refuse_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_text("one")
    monkeypatch.delattr(os, "O_NOFOLLOW")
    with pytest.raises(OSError, match="symbolic link"):
        durable.open_file(tmp_path / "link", os.O_RDONLY)
    os.close(durable.open_file(tmp_path / "link", os.O_RDONLY, follows_links=True))


def test_a_lock_that_nobody_may_read_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / LOCK_NAME).touch()
    monkeypatch.setattr(Path, "read_text", refuse)
    assert not is_held(tmp_path)
    monkeypatch.setattr(lock, "IS_POSIX", False)
    assert is_held(tmp_path)
