"""The wheel: built, installed into an empty environment, and used from a folder that is not the clone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = ("tunekit", "recipes", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


def run(command: Sequence[str | Path], folder: Path) -> str:
    """The output of a command that must succeed; nothing of the clone or of this process's settings helps it."""
    kept = ("PATH", "HOME", "LANG", "OMP_NUM_THREADS", "TMPDIR")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment["XDG_CACHE_HOME"] = str(folder / "cache")
    done = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the clone stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source, ignored = REPOSITORY / name, shutil.ignore_patterns("__pycache__", "runs")
        if source.is_dir():
            shutil.copytree(source, folder / "source" / name, ignore=ignored)
        else:
            shutil.copy(source, folder / "source" / name)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", folder]
    run([sys.executable, "-m", "pip", "wheel", *options, folder / "source"], folder)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_the_recipes_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {file.relative_to(REPOSITORY).as_posix() for file in (REPOSITORY / "tunekit").rglob("*.py")}
    for pattern in ("assets/*", "tested_versions.txt", "native/*.c", "reading/*.yaml"):
        package |= {file.relative_to(REPOSITORY).as_posix() for file in (REPOSITORY / "tunekit").rglob(pattern)}
    files = [file for file in (REPOSITORY / "recipes").rglob("*") if file.is_file()]
    shipped = [file.relative_to(REPOSITORY / "recipes") for file in files]
    recipes = {f"tunekit/shipped_recipes/{file.as_posix()}" for file in shipped if file.parts[0] != "runs"}
    assert {name for name in names if ".dist-info/" not in name} == package | recipes
    assert any(name.endswith("/LICENSE") for name in names)


def test_smoke_runs_from_another_folder_with_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    """The libraries are those of this environment, lent by a path file; tunekit is the wheel's."""
    venv.create(tmp_path / "environment", with_pip=False, symlinks=True)
    python = tmp_path / "environment" / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run([python, "-c", code], tmp_path).strip())
    install = ["install", "--no-deps", "--quiet", wheel]
    run([sys.executable, "-m", "pip", "--python", python, *install], tmp_path)
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    where = Path(run([python, "-c", "import tunekit; print(tunekit.__file__)"], folder).strip())
    assert where.is_relative_to(packages)

    tunekit = tmp_path / "environment" / "bin" / "tunekit"
    assert "smoke" in run([tunekit, "recipes"], folder)
    run([tunekit, "recipes", "smoke", "--copy", "mine/try.yaml"], folder)
    run([tunekit, "train", "mine/try.yaml"], folder)
    report = json.loads((folder / "mine" / "runs" / "smoke" / "report.json").read_text())
    assert report["adapter_bytes"] > 0
