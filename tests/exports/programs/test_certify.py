"""scripts/certify and the module that it runs, without installing anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tunekit.exports.programs import install as module
from tunekit.exports.programs.versions import CONVERTER, PROGRAMS, STAMP

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


def make_environment(folder: Path) -> None:
    (folder / "mlx/bin").mkdir(parents=True)
    (folder / "mlx/bin/python").touch()
    (folder / "mlx" / STAMP).write_text(json.dumps(PROGRAMS["mlx"].requirements))


def test_an_installed_program_is_left_as_it_is(folder: Path) -> None:
    make_environment(folder)
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


def test_a_broken_environment_is_made_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(module.subprocess, "run", lambda command, check: ran.append(command))
    make_environment(folder)
    (folder / "mlx/bin/python").unlink()
    assert module.install("mlx") == 0
    assert [command[2] for command in ran] == ["venv", "pip"]


def test_llama_cpp_comes_with_its_converter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(module.subprocess, "run", lambda command, check: ran.append(command))
    assert module.install("llama.cpp") == 0
    assert ran[-1][-4:-1] == ["--target", str(folder / CONVERTER), PROGRAMS["llama.cpp"].converter[0]]
    (folder / "llama.cpp/bin").mkdir()
    (folder / "llama.cpp/bin/python").touch()
    assert not module.is_installed("llama.cpp")
    (folder / CONVERTER).mkdir()
    assert module.is_installed("llama.cpp")


def test_a_python_without_venv(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], check: bool) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(module.subprocess, "run", run)
    assert module.install("mlx") == 1
    assert capsys.readouterr().err == "mlx is not installed: venv ended with 1\n"
    assert not module.is_installed("mlx")


def test_an_installed_tunekit_installs_programs_too() -> None:
    command = [sys.executable, "-m", "tunekit.exports.programs.install", "ollama"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (2, f"ollama is unknown; choose from {', '.join(PROGRAMS)}\n")
