"""scripts/certify, without installing anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tunekit.exports.programs.versions import PROGRAMS, STAMP

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "certify"


def certify(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNEKIT_PROGRAMS", str(tmp_path))
    return tmp_path


def test_unknown_programs() -> None:
    ended = certify("mlx", "ollama")
    assert ended.returncode == 2
    assert ended.stderr == f"ollama is unknown; choose from {', '.join(PROGRAMS)}\n"
    assert certify().stderr.startswith("no program is named; choose from llama.cpp")


def test_an_installed_program_is_left_as_it_is(folder: Path) -> None:
    (folder / "mlx").mkdir()
    (folder / "mlx" / STAMP).write_text(json.dumps(PROGRAMS["mlx"].requirements))
    ended = certify("mlx")
    assert (ended.returncode, ended.stdout) == (0, f"mlx is installed in {folder / 'mlx'}\n")
    states = {line.split()[0]: " ".join(line.split()[1:3]) for line in certify("--list").stdout.splitlines()}
    assert states["vllm"] == "not installed"
    assert states["mlx"].startswith("installed ")
    assert list(states) == list(PROGRAMS)


def test_a_folder_of_somebody_else_is_not_removed(folder: Path) -> None:
    (folder / "mlx").mkdir()
    (folder / "mlx" / "notes.txt").write_text("mine")
    ended = certify("mlx")
    assert (ended.returncode, ended.stderr) == (2, f"{folder / 'mlx'} was not made by this script; move it away\n")
    assert (folder / "mlx" / "notes.txt").read_text() == "mine"
