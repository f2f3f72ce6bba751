"""Versions in messages: a package that fails in a version with which nobody tested it is named before the model."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.train_case import write_recipe
from tunekit import doctor
from tunekit.machine import versions
from tunekit.machine.environment import read_environment

BAD = "def fail(kind, text): raise kind(text)\ndef call(work): return work()\n"
TESTED = "# tested\nplanted-parts==1.2.0\nplanted-parts==1.3  # elsewhere\nplanted-old[all]==2.0 ; os_name == 'posix'\n"


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Writes a package of this name, version and code, and imports it."""
    table = tmp_path / "tested.txt"
    table.write_text(TESTED, "utf-8")
    monkeypatch.setattr(versions, "TESTED_FILE", table)
    monkeypatch.setattr(versions, "lowest_versions", lambda: {"planted-old": "1.5"})
    versions.tested_versions.cache_clear()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))

    def plant(name: str, version: str, code: str = BAD) -> Any:
        write_package(tmp_path / "site", name, version, code)
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    yield plant
    versions.tested_versions.cache_clear()
    for name in [name for name in sys.modules if name.startswith("planted_")]:
        del sys.modules[name]


def write_package(site: Path, name: str, version: str, code: str) -> None:
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "utf-8")
    (site / f"{name}.py").write_text(code, "utf-8")


def caught(work: Callable[[], object]) -> Exception:
    try:
        work()
    except Exception as error:
        return error
    raise AssertionError("no error")


def test_a_package_that_fails_inside_itself_is_named_only_if_its_version_differs(planted: Any) -> None:
    newer = planted("planted_parts", "9.9")
    what, how = versions.version_failure(caught(lambda: newer.fail(KeyError, "rope"))) or ("", "")
    assert what == "planted-parts 9.9 failed inside itself (KeyError: 'rope')"
    assert how == "tunekit was tested with 1.3: run pip install planted-parts==1.3"
    assert versions.version_failure(caught(lambda: newer.fail(OSError, "no such file"))) is None  # it blames the files
    assert versions.suspected(caught(lambda: newer.fail(OSError, "no such file"))).advice == how  # type: ignore[union-attr]
    called = caught(lambda: newer.call(lambda: versions.Package("a", 1, "2").is_newer))  # type: ignore[arg-type]
    assert versions.version_failure(called) is None  # our own code failed, called by the package
    assert versions.version_failure(called, "planted_parts")
    absent = caught(lambda: newer.gone())
    assert versions.version_failure(absent) == (what.replace("KeyError: 'rope'", f"AttributeError: {absent}"), how)


@pytest.mark.parametrize("version", ["1.3.0", "1.3+cpu", "1.2", "1.3.0rc1"])
def test_a_tested_version_is_not_blamed(planted: Any, version: str) -> None:
    package = planted("planted_parts", version)
    assert versions.version_failure(caught(lambda: package.fail(KeyError, "rope"))) is None


def test_a_package_that_is_too_old_is_named(planted: Any) -> None:
    old = planted("planted_old", "1.4.9")
    _, how = versions.version_failure(caught(lambda: old.fail(TypeError, "no such argument"))) or ("", "")
    assert how == "tunekit needs planted-old 1.5 or newer: run pip install planted-old==2.0"


def test_texts_of_import_errors_are_not_shown(planted: Any) -> None:
    whole = planted("planted_whole", "3.0", "pass")
    cases = {
        "from planted_whole import lost": "planted-whole 3.0 has no lost",
        "import planted_whole.lost": "planted-whole 3.0 has no module planted_whole.lost",
        "import planted_nowhere.part": "the package planted-nowhere is not installed",
        "raise ImportError('libsecret.so.12: cannot open shared object file')": "the native library libsecret.so.12",
        "raise ImportError('/secret/path')": "its import failed",
    }
    for number, (code, words) in enumerate(cases.items()):
        error = caught(lambda code=code, number=number: planted(f"planted_broken{number}", "1.0", code))  # type: ignore[misc]
        what, how = versions.import_failure(error) or ("", "")
        assert words in what
        assert "pip install" in how
        assert str(error) not in f"{what} {how}"
        assert whole.__file__ not in what
    socket = "import socket\nsocket.create_connection(('127.0.0.1', 1), timeout=1)\n"
    what, how = versions.import_failure(caught(lambda: planted("planted_kernels", "1.0", socket))) or ("", "")
    assert what.startswith("planted-kernels 1.0 cannot be imported (ConnectionRefusedError: ")
    assert "pip install --force-reinstall planted-kernels" in how


def test_bounds_are_those_of_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [
        f'{text}; extra == "{extra}"' for extra, texts in project["optional-dependencies"].items() for text in texts
    ]
    monkeypatch.setattr("importlib.metadata.requires", lambda _name: [*project["dependencies"], *extras])
    bounds = {
        versions.normalised(name): bound for name, bound in (each.split(">=") for each in project["dependencies"])
    }
    lowest = versions.lowest_versions.__wrapped__()
    assert bounds.items() <= lowest.items()
    assert lowest["diffusers"] == "0.36"  # the developers' bound is higher
    assert not {"mypy", "mkdocs-material"} & lowest.keys()
    assert bounds.keys() <= versions.tested_versions().keys()


def test_doctor_and_the_run_show_tested_versions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(versions, "tested_versions", lambda: {"torch": "0.1", "transformers": "99"})
    for module in ("environment", "versions"):
        monkeypatch.setattr(f"tunekit.machine.{module}.tested_versions", lambda: {"torch": "0.1", "transformers": "99"})
    monkeypatch.setattr(versions, "lowest_versions", lambda: {"numpy": "99.1"})
    doctor.doctor_verb(False, "-")
    told = capsys.readouterr()
    [torch_line] = [line.split() for line in told.err.splitlines() if line.split()[:1] == ["torch"]]
    assert torch_line[1] == "0.1"
    assert torch_line[-1] == "(newer)"
    assert "(older than 99.1)" in told.err
    assert "tunekit needs numpy 99.1 or newer: run pip install 'numpy>=99.1'" in told.err
    assert json.loads(told.out)["tested_versions"] == {"torch": "0.1", "transformers": "99"}
    assert read_environment(device="cpu")["tested_versions"] == {"torch": "0.1", "transformers": "99"}


PLANTED = """
import sys
import transformers
from transformers.models.auto import configuration_auto
transformers.__version__ = "9.9"
exec("def fail(*_, **__): raise {error}", vars(configuration_auto))
transformers.AutoConfig.from_pretrained = configuration_auto.fail
from tunekit.cli import main
main()
"""


@pytest.mark.parametrize("error", ["AttributeError('rope')", "ImportError('/secret')", "OSError('no config')"])
def test_plan_names_a_newer_transformers_before_the_model(error: str, tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)
    command = [sys.executable, "-c", PLANTED.format(error=error), "plan", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    tested = versions.tested_versions()["transformers"]
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert f"tunekit was tested with {tested}: run pip install transformers=={tested}" in line
    assert "transformers 9.9" in line
    assert "/secret" not in line
    assert ("failed inside itself" in line) == (not error.startswith("OSError"))
    assert line.find("pip install") < (line + "another base").find("another base")


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ("sys.modules['transformers'] = None", "the package transformers is not installed; run: pip install"),
        ("import tokenizers; del tokenizers.Tokenizer", "tokenizers {tokenizers} has no Tokenizer"),
    ],
)
def test_a_command_whose_import_fails_ends_in_one_line(
    before: str, words: str, tmp_path: Path, tiny_llama: Path
) -> None:
    code = f"import sys; {before}; from tunekit.cli import main; main()"
    command = [sys.executable, "-c", code, "plan", str(write_recipe(tmp_path, tiny_llama))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    [line] = done.stderr.splitlines()
    assert done.returncode == 2
    assert words.format(**versions.tested_versions()) in line
    assert "pip install" in line
