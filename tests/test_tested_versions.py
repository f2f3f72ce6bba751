"""scripts/tested_versions and scripts/setup: the file of tested versions is made, and installed, as its head says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parent.parent
FILE = "tunekit/machine/tested_versions.txt"
OLD = """\
# The head.
gone==1.0
numpy==2.3.0 ; python_version < "3"
numpy==2.4.0 ; python_version >= "3"
torch==2.12.0
triton==3.6.0 ; sys_platform == "other"
"""
NEW = """\
# The head.
numpy==2.3.0 ; python_version < "3"
numpy==2.5.0 ; python_version >= "3"
some-new-one==1.0
torch==2.13.0
triton==3.6.0 ; sys_platform == "other"
"""
CHANGES = [
    "gone 1.0 -> absent",
    'numpy (python_version >= "3") 2.4.0 -> 2.5.0',
    "some-new-one absent -> 1.0",
    "torch 2.12.0 -> 2.13.0",
]
# What a fake environment's Python answers for OLD.
PROBED = (
    '["3.11.7", {"numpy": "2.5.0", "torch": "2.13.0+cpu", "Some_New.one": "1.0", "tunekit": "0.1.0", "pip": "26"}, '
    '["python_version >= \\"3\\""], 100.0]'
)
RUN = """<testsuites><testsuite name="pytest" errors="0" failures="{failures}" skipped="2" tests="10" time="61.7"
timestamp="2026-12-07T10:00:00+00:00"><testcase classname="tests.test_a" name="test_b[c]"><failure /></testcase>
<testcase classname="tests.test_a" name="test_d" /></testsuite></testsuites>"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the script, OLD as the file of tested versions, and .venv, whose Python answers PROBED."""
    for folder in ("scripts/results", "tunekit/machine", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("scripts/tested_versions", "scripts/setup"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = [\n  "torch>=2.9",\n  "numpy>=2.0.2",\n]\n')
    (tmp_path / FILE).write_text(OLD)
    write_program(tmp_path / ".venv/bin/python", f"cat << 'END'\n{PROBED}\nEND")
    return tmp_path


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def leave_run(environment: Path, failures: int = 0, age: float = 200.0) -> None:
    """The results of a test run that ended `age` seconds after 1970; the packages are of second 100."""
    (environment / "tests.xml").write_text(RUN.format(failures=failures))
    os.utime(environment / "tests.xml", (age, age))


def run(clone: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/tested_versions", *options]
    return subprocess.run(command, cwd=clone, capture_output=True, text=True)


def test_the_file_gets_the_versions_of_the_environment_and_each_change_is_printed(clone: Path) -> None:
    leave_run(clone / ".venv")
    done = run(clone)
    assert done.returncode == 0, done.stderr
    assert (clone / FILE).read_text() == NEW
    assert done.stdout.splitlines() == CHANGES
    assert run(clone).stdout == "no version changed\n"


def test_check_writes_nothing_and_fails_if_a_version_differs(clone: Path) -> None:
    done = run(clone, ".venv", "--check")
    assert (done.returncode, done.stdout.splitlines()) == (1, CHANGES)
    assert (clone / FILE).read_text() == OLD
    (clone / FILE).write_text(NEW)
    assert run(clone, ".venv", "--check").returncode == 0


@pytest.mark.parametrize(
    ("failures", "age", "reason"),
    [(1, 200.0, ".venv: 1 tests failed"), (0, 50.0, "run scripts/test\n"), (0, None, "run scripts/test\n")],
)
def test_the_file_stays_without_a_passed_run_of_these_packages(
    clone: Path, failures: int, age: float | None, reason: str
) -> None:
    if age is not None:
        leave_run(clone / ".venv", failures, age)
    done = run(clone)
    assert done.returncode == 1
    assert reason in done.stderr
    assert (clone / FILE).read_text() == OLD


def test_the_page_shows_versions_and_counts_of_the_three_environments(clone: Path) -> None:
    for name in (".venv-newest", ".venv-floors"):
        shutil.copytree(clone / ".venv", clone / name)
        leave_run(clone / name, failures=1)
    assert run(clone, "--page").stderr.endswith("run scripts/test\n")
    leave_run(clone / ".venv")
    done = run(clone, "--page")
    assert done.returncode == 0, done.stderr
    page = (clone / "scripts/results/versions.md").read_text()
    assert "| torch | 2.13.0+cpu | 2.13.0+cpu | 2.13.0+cpu |\n| numpy | 2.5.0 |" in page
    assert "| passed | 8 | 7 | 7 |\n| failed | 0 | 1 | 1 |\n| skipped | 2 | 2 | 2 |\n| seconds | 62 | 62 | 62 |" in page
    assert "- `scripts/test --newest`: tests/test_a.py::test_b[c]\n" in page
    assert "test_d" not in page


def test_the_file_of_this_clone_has_the_format_that_its_head_states() -> None:
    """One release of each direct dependency of the extra dev; pip can read every line; no build is named."""
    lines = [line for line in (REPOSITORY / FILE).read_text("utf-8").splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*( ; .+)?", line)] == []
    assert lines == sorted(lines, key=lambda line: line.split("=")[0])
    versions = {entry.name: str(entry.specifier)[2:] for entry in map(Requirement, lines)}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    for requirement in map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["dev"]]):
        name = requirement.name.lower().replace("_", "-")
        assert versions[name] in requirement.specifier, name


def installations(clone: Path, *options: str) -> list[str]:
    """The options of `pip install` in one run of scripts/setup, whose Pythons only write their arguments down."""
    calls = clone / "calls"
    calls.unlink(missing_ok=True)
    for folder in (".venv", ".venv-newest", ".venv-floors"):
        (clone / folder / "bin").mkdir(parents=True, exist_ok=True)
        write_program(clone / folder / "bin/python", f'case "$2" in pip) echo "{folder} $*" >> {calls} ;; esac')
    subprocess.run([clone / "scripts/setup", *options], check=True, capture_output=True)
    return calls.read_text().splitlines() if calls.exists() else []


def test_setup_installs_the_tested_versions_again_after_they_changed(clone: Path) -> None:
    call = [f".venv -m pip install --quiet --constraint {FILE} --editable .[dev]"]
    assert installations(clone, "dev") == call
    assert installations(clone, "dev") == []
    (clone / FILE).write_text(NEW)
    assert installations(clone, "dev") == call


def test_newest_and_floors_have_environments_of_their_own_without_the_tested_versions(clone: Path) -> None:
    call = [".venv-newest -m pip install --quiet --upgrade --upgrade-strategy eager --editable .[dev]"]
    assert installations(clone, "dev", "--newest") == call
    assert installations(clone, "--newest", "dev") == call  # there may be newer ones now
    torch, tunekit = installations(clone, "dev", "--floors")
    assert torch == ".venv-floors -m pip install --quiet torch==2.9+cpu"
    assert tunekit == ".venv-floors -m pip install --quiet --constraint .venv-floors/floors.txt --editable .[dev]"
    assert (clone / ".venv-floors/floors.txt").read_text() == "torch==2.9\nnumpy==2.0.2\n"
    assert installations(clone, "dev", "--floors") == []


def test_setup_refuses_an_unknown_option(clone: Path) -> None:
    done = subprocess.run([clone / "scripts/setup", "dev", "--floor"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("--floor is no option")
