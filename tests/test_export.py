"""`tunekit export`: what is refused before anything is written, and what is printed and kept of a certificate."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import tunekit.export
from tests.arithmetic.test_merge import prepared
from tests.conftest import write_tiny_llama
from tests.support.run_case import write_run
from tests.support.train_case import Ended, in_child, kill_self
from tunekit.cli import app
from tunekit.errors import InputError, Problem, ResourceError, RunFolderError
from tunekit.export import export_verb
from tunekit.exports import questions
from tunekit.exports.format import Certificate, Difference, Evidence, Exported, Options, Questions, known_formats
from tunekit.exports.programs.program import Program
from tunekit.exports.questions import NotComparable
from tunekit.exports.whole_model import whole_model
from tunekit.files.work_folder import MARK, new_path
from tunekit.merge import merge_verb
from tunekit.targets.exportable import Exportable, make_exportable
from tunekit.targets.target import find_target


class Format:
    """A format that copies config.json, and whose program answers as torch does."""

    TAKES, OPTIONS, SUFFIX, PROGRAM = frozenset({"model"}), frozenset({"type"}), ".copy", "mlx"

    def problems(self, exportable: Exportable, options: Options) -> list[Problem]:
        return [Problem("no such type", "choose another", key="--type")] if options.type == "none" else []

    def write(self, exportable: Exportable, path: Path, evidence: Evidence, options: Options) -> Exported:
        path.write_text((exportable.folder / "config.json").read_text())
        if options.type == "broken":
            raise InputError("broke off")
        return Exported(path, "model", (f"cat {path}",))

    def certify(
        self,
        written: Exported,
        exportable: Exportable,
        program: Program,
        ask: Callable[[], Questions],
        options: Options,
    ) -> Certificate:
        asked = ask()
        assert asked.base is None  # computed only for an adapter alone
        count = sum(map(len, asked.rows))
        return Certificate("cat", "9.1", asked.described, {"model": Difference(0.0, 0.0, 2.0, 2.0, 0, count)})


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tunekit.export, "load_format", lambda name: Format())
    monkeypatch.setattr(tunekit.export, "find_program", lambda name: Program(name, "1.0", Path(sys.executable)))
    write_tiny_llama(tmp_path / "base")
    return tmp_path / "base"


def test_the_export_and_its_certificate_are_written(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = base.parent / "config.copy"
    export_verb(str(base), "copy", str(file))
    printed = capsys.readouterr().out
    assert file.read_text() == (base / "config.json").read_text()
    assert f"cat {file}" in printed
    assert "cat 9.1 and torch" in printed
    facts = json.loads(file.with_name("config.copy.certificate.json").read_text())
    assert facts["certificate"]["parts"]["model"]["perplexity"] == 2.0
    assert facts["certificate"]["parts"]["model"]["tokens"] > 4


def test_a_printed_command_can_be_pasted(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = base.parent / "my model.copy"
    export_verb(str(base), "copy", str(file))
    assert f"cat '{file}'" in capsys.readouterr().out


def test_all_problems_are_shown_before_anything_is_written(base: Path) -> None:
    file = base.parent / "config.txt"
    with pytest.raises(InputError) as refused:
        export_verb(str(base), "copy", str(file), None, Options(type="none", imatrix=True))
    keys = [problem.key for problem in refused.value.problems]
    assert keys == ["--imatrix", "--output", "--type"]
    assert not file.exists()


def test_an_existing_file_is_never_replaced_and_a_broken_one_removed(base: Path) -> None:
    file = base.parent / "config.copy"
    file.write_text("mine")
    with pytest.raises(InputError, match="exists"):
        export_verb(str(base), "copy", str(file))
    assert file.read_text() == "mine"
    file.unlink()
    with pytest.raises(InputError, match="broke off"):
        export_verb(str(base), "copy", str(file), None, Options(type="broken"))
    assert sorted(path.name for path in base.parent.iterdir()) == ["base"]


def test_an_output_inside_of_an_input_or_a_run_is_refused(base: Path, tmp_path: Path) -> None:
    adapter, _ = prepared(tmp_path / "tuned", "llama", target_modules=["q_proj"])
    run = write_run(tmp_path / "run")
    places = {
        base / "config.copy": "overlaps",
        run / "config.copy": "is in the run",
        run / "in" / "x.copy": "is in the run",
    }
    for output, reason in places.items():
        with pytest.raises(InputError, match=f"--output: .* {reason} .*; name a "):
            export_verb(str(base), "copy", str(output))
        assert not output.exists()
    for output in (adapter / "merged", run / "merged"):
        with pytest.raises(InputError, match=r"--output: .*; name a "):
            merge_verb(str(adapter), str(output), None, None, [])


def test_a_program_that_is_required_must_be_installed(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tunekit.export, "find_program", lambda name: None)
    export_verb(str(base), "copy", str(base.parent / "first.copy"))
    assert "not certified: mlx is not installed" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"--certify: mlx is not installed; install it with: python -m .* mlx"):
        export_verb(str(base), "copy", str(base.parent / "second.copy"), certify=True)
    assert not (base.parent / "second.copy").exists()


def test_a_model_that_does_not_fit_into_memory_is_exported_without_certificate(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(questions, "available_bytes", lambda device: 1000)
    export_verb(str(base), "copy", str(base.parent / "first.copy"))
    assert "not certified: torch needs " in capsys.readouterr().out
    assert not (base.parent / "first.copy.certificate.json").exists()
    with pytest.raises(NotComparable, match="are free"):
        questions.make_questions(make_exportable(find_target(str(base), None, [])))


def test_a_program_that_does_not_read_the_export_is_an_error(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise InputError("mlx ended with exit code 1", "see its log")

    monkeypatch.setattr(Format, "certify", fail)
    with pytest.raises(InputError, match="the export is written, but mlx ended with exit code 1; see its log"):
        export_verb(str(base), "copy", str(base.parent / "first.copy"))
    assert (base.parent / "first.copy").exists()


def test_merged_needs_an_adapter(base: Path) -> None:
    with pytest.raises(InputError, match="--merged: there is no adapter to merge"):
        export_verb(str(base), "copy", str(base.parent / "first.copy"), None, Options(merged=True))


def test_unknown_formats_and_kinds_are_refused(tmp_path: Path) -> None:
    assert "kohya" in known_formats()
    write_tiny_llama(tmp_path / "base")
    with pytest.raises(InputError, match="kohya takes a pipeline adapter, and the target is a model"):
        export_verb(str(tmp_path / "base"), "kohya", str(tmp_path / "new.safetensors"))
    with pytest.raises(InputError, match=r"mlx takes an adapter, .*programs read the model's folder itself; .*doctor"):
        export_verb(str(tmp_path / "base"), "mlx", str(tmp_path / "new"))
    with pytest.raises(InputError, match=r"^--to: kohia is unknown; choose .*kohya"):
        export_verb(str(tmp_path / "base"), "kohia", str(tmp_path / "new.safetensors"))


def test_the_help_names_every_format() -> None:
    (option,) = (each for each in get_command(app).commands["export"].params if each.name == "to")
    assert sorted(re.findall(r"[\w-]+", option.help.replace(" or ", " "))) == list(known_formats())


@pytest.mark.parametrize("done", [export_verb, merge_verb])
def test_the_work_of_a_killed_process_is_removed_by_the_next_one(tmp_path: Path, done: Any) -> None:
    """Its merged model would take the disk for ever. Neither a running process nor the user loses a folder."""
    adapter, _ = prepared(tmp_path, "llama", target_modules=["q_proj"])
    output = tmp_path / "out.copy"
    words = (str(adapter), "copy", str(output)) if done is export_verb else (str(adapter), str(output), None, None, [])

    class Whole(Format):
        TAKES = frozenset({"adapter"})

        def write(self, exportable: Exportable, path: Path, evidence: Evidence, options: Options) -> Exported:
            with whole_model(exportable, path) as folder:
                shutil.copytree(folder, path)
            return Exported(path, "merged")

    def run(kill: bool) -> Ended:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tunekit.export, "load_format", lambda name: Whole())
            patch.setattr(tunekit.export, "find_program", lambda name: None)
            if kill:
                patch.setattr("tunekit.arithmetic.merge_output.write_report", lambda *_: kill_self())
            return in_child(lambda: done(*words), tmp_path / "log")

    assert run(kill=True).code == -signal.SIGKILL
    assert list(tmp_path.rglob("model.safetensors")) != [tmp_path / "base" / "model.safetensors"]
    running, mine = (tmp_path / f".out.copy.part-{name}" for name in ("running", "mine"))
    for folder in (running, mine):
        folder.mkdir()
        (folder / "file").write_text("text")
    (running / MARK).write_text(f"{os.getpid()}\n{socket.gethostname()}\n")
    assert run(kill=False).code == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"base", "adapter", "log", "out.copy", running.name, mine.name}


def test_a_full_disk_is_named_by_the_output(base: Path) -> None:
    """The error of a copy names its source too."""
    output = base.parent / "out.copy"
    with pytest.raises(ResourceError, match=rf"no room for {output}: .*free some space"), new_path(output):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(base / "config.json"), None, "there")
    assert [path.name for path in base.parent.iterdir()] == ["base"]


def test_an_output_that_appeared_meanwhile_stays(tmp_path: Path) -> None:
    late = tmp_path / "late"

    def write() -> None:
        with new_path(late) as partial:
            partial.mkdir()
            late.mkdir()
            (late / "notes.txt").write_text("mine")

    with pytest.raises(RunFolderError, match=r"late has appeared .*use .*late\.1"):
        write()
    assert (late / "notes.txt").read_text() == "mine"
    assert (tmp_path / "late.1").is_dir()


def test_a_new_folder_is_flushed_and_renamed(tmp_path: Path) -> None:
    with new_path(tmp_path / "new") as partial:
        (partial / "inner").mkdir(parents=True)
        (partial / "inner" / "file").write_text("text")
    assert (tmp_path / "new" / "inner" / "file").read_text() == "text"
