"""What scripts/new writes is picked up and passes the contract tests, in a copy of the project."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
COPIED = ("tunekit", "tests", "scripts", "recipes", "README.md", "pyproject.toml")
LINTED = ("formats", "metrics", "model", "objectives", "companions")  # folders of the tests that scripts/new writes
KINDS = {
    "adapter": (["tests/contract/test_layer_contract.py", "tests/test_readme.py"], 1 + 4 * 6),
    "start": (["tests/contract/test_starts_contract.py"], 5 * 2),
    "objective": (["tests/contract/test_objective_contract.py"], 3),
    "loss": (["tests/objectives/test_new_loss.py"], 1),
    "companion": (["tests/companions/test_new_companion.py"], 1),
    "format": (["tests/formats"], 2),
    "metric": (["tests/metrics", "tests/recipe/test_schema.py"], 2),
    "family": (["tests/model/test_new_family.py"], 1),
}


def call(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    shared = os.environ.get("TUNEKIT_SHARED", str(REPOSITORY.parent / "shared"))
    environment = {**os.environ, "TUNEKIT_SHARED": shared, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False, env=environment
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with a new one of every kind."""
    folder = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(source, folder)
    for kind in KINDS:
        written = call(folder, "scripts/new", kind, f"new_{kind}")
        assert written.returncode == 0, written.stderr
        files = [line for line in written.stdout.splitlines() if line.startswith("wrote tunekit/")]
        assert len(files) == (2 if kind in ("adapter", "start", "objective") else 1)
    return folder


@pytest.mark.parametrize(
    "kind", [kind if kind == "format" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_what_is_written_passes_the_tests_of_its_kind(kind: str, copy: Path) -> None:
    tests, least = KINDS[kind]
    named = [] if kind not in ("adapter", "start", "objective") else ["-k", f"new_{kind} or table_of_methods"]
    done = call(copy, "-m", "pytest", "-p", "no:cacheprovider", *named, *tests)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(done.stdout.rpartition(" passed")[0].split()[-1]) >= least, done.stdout[-300:]
    again = call(copy, "scripts/new", kind, f"new_{kind}")
    assert again.returncode == 1
    assert "exists already" in again.stderr


@pytest.mark.drawn
def test_what_is_written_keeps_the_rules_of_the_project(copy: Path) -> None:
    done = call(copy, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_architecture.py")
    assert done.returncode == 0, done.stdout[-3000:]
    for words in (["check", "--quiet"], ["format", "--check", "--quiet"]):
        linted = call(copy, "-m", "ruff", *words, "tunekit", *(f"tests/{name}" for name in LINTED))
        assert linted.returncode == 0, linted.stdout


def test_a_name_that_cannot_be_a_file_is_refused() -> None:
    for words in (["adapter", "New-one"], ["adaptor", "x"], []):
        done = call(REPOSITORY, "scripts/new", *words)
        assert done.returncode == 1
        assert done.stderr.startswith("usage:")
