"""scripts/ on machines that lack something, and after an interruption."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with scripts/setup, and a Python whose `-m venv` makes an environment with a `pip` that does nothing."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(REPOSITORY / "scripts" / "setup", tmp_path / "scripts")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\n')
    (tmp_path / "tunekit/machine").mkdir(parents=True)
    (tmp_path / "tunekit/machine/tested_versions.txt").write_text("torch==2.13.0\n")
    whole = f'#!/bin/sh\ncase "$2" in pip) exit;; esac\nexec {shlex.quote(sys.executable)} "$@"\n'
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nfor folder; do :; done\nmkdir -p "$folder/bin"\n'
        f'cat > "$folder/bin/python" <<\'END\'\n{whole}END\nchmod +x "$folder/bin/python"\n'
    )
    python.chmod(0o755)
    return tmp_path


def set_up(clone: Path) -> list[str]:
    """Run scripts/setup; returns the calls of `python -m venv`."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(clone / "python")}
    subprocess.run([str(clone / "scripts" / "setup")], env=environment, check=True, capture_output=True)
    calls = clone / "calls"
    return calls.read_text().splitlines() if calls.exists() else []


def test_setup_keeps_a_whole_environment_and_replaces_a_half_one(clone: Path) -> None:
    """After a failed `python3 -m venv`, bin/python is there without pip."""
    made = ["-m venv --clear .venv"]
    assert set_up(clone) == made
    assert set_up(clone) == made  # nothing to do
    (clone / ".venv/bin/python").write_text("#!/bin/sh\nexit 1\n")
    assert set_up(clone) == made * 2


@pytest.mark.parametrize("path", ["scripts/quickstart", "scripts/test", "scripts/setup", "scripts/check", ".ci/run"])
def test_no_script_expands_an_array_that_may_be_empty(path: str) -> None:
    """With `set -u`, bash 3.2 of macOS calls an empty array unset: "${a[@]}" ends the script."""
    text = (REPOSITORY / path).read_text(encoding="utf-8")
    empty = [line.split("=()")[0].split()[-1] for line in text.splitlines() if "=()" in line]
    for name in empty:
        assert text.count(f'"${{{name}[@]}}"') == text.count(f'${{{name}[@]+"${{{name}[@]}}"}}'), name
    assert path != "scripts/quickstart" or empty == ["resume"]


def test_tests_run_without_git(tmp_path: Path) -> None:
    """Images for GPUs often have no git."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_scripts.py",
    ]
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
