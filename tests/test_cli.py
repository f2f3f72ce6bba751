"""The command line: exit codes, a line for each problem, no traceback; --help and validate import nothing heavy."""

from __future__ import annotations

import ast
import errno
import gc
import json
import logging
import os
import platform
import pty
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.main import get_command

import tunekit.validate
from tests.recipe.test_reader import SMALL
from tunekit.cli import app, main, start
from tunekit.commands.order import ORDER
from tunekit.console.loudness import LOUDNESS
from tunekit.errors import NumericsError, Problem, RecipeError, ResourceError, Stopped, exit_message
from tunekit.machine.threads import WAITING, thread_settings
from tunekit.machine.variables import ALLOCATOR, allocator_settings, torch_build, variables
from tunekit.model.transformers_guard import quiet
from tunekit.recipe.load import check_draft, load_recipe, read_draft
from tunekit.recipe.reading.shipped import shipped_recipes
from tunekit.training import begin
from tunekit.validate import CHECKED

HEAVY = ("torch", "transformers", "numpy", "datasets", "accelerate", "peft", "rich", "tunekit.model", "tunekit.train")


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Call main() in this process; the exit code."""
    monkeypatch.setattr(sys, "argv", ["tunekit", *words])
    for name, value in (variables() | thread_settings(os.environ)).items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def call(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m tunekit` in a process of its own."""
    command = [sys.executable, "-m", "tunekit", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


@pytest.mark.parametrize("command", ["merge run --output model", "data rank run", "adapter show run", "sweep r.yaml"])
def test_a_command_of_one_process_is_refused_under_torchrun(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr("tunekit.machine.meeting.tell_early", lambda error: os.environ["RANK"] == "0")
    assert run(monkeypatch, *command.split()) == 2
    name, _, rest = capsys.readouterr().err.partition(" computes")
    assert rest == " in one process; start it without torchrun\n"
    assert command.startswith(name)
    monkeypatch.setenv("RANK", "1")
    assert run(monkeypatch, *command.split()) == 2
    assert not capsys.readouterr().err, "rank 0 prints it"


@pytest.mark.parametrize("written", [{}, {"PYTORCH_ALLOC_CONF": "a:1"}, {"PYTORCH_CUDA_ALLOC_CONF": "b:1"}])
def test_the_gpus_allocator_is_told_what_nobody_else_told_it(written: dict[str, str]) -> None:
    program = (
        "import os, sys; from tunekit.cli import app; app(['recipes'], standalone_mode=False);"
        f"print(*(os.environ.get(name) for name in {ALLOCATOR!r}), file=sys.stderr)"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTORCH_")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=clean | written
    )
    expected = allocator_settings(written, platform.system(), platform.release(), torch_build()) | written
    assert done.stderr.splitlines()[-1].split() == [expected.get(name, "None") for name in ALLOCATOR]


@pytest.mark.drawn
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="torch has another OpenMP library")
@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({}, "GOMP_SPINCOUNT = '0'"),  # PASSIVE is printed by default too, with a count of 300000
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "OMP_WAIT_POLICY = 'ACTIVE'"),
        ({"GOMP_SPINCOUNT": "123"}, "GOMP_SPINCOUNT = '123'"),
    ],
)
def test_threads_wait_without_spinning_unless_the_user_chose(written: dict[str, str], expected: str) -> None:
    """As the OpenMP library itself prints it while torch loads it."""
    clean = {name: value for name, value in os.environ.items() if name not in WAITING}
    command = [sys.executable, "-m", "tunekit", "doctor"]
    environment = clean | written | {"OMP_DISPLAY_ENV": "VERBOSE", "TUNEKIT_DEVICE": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert expected in done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "x.yaml", "-q"], "-q belongs before the command, as in: tunekit -q train"),
        (["plan", "x.yaml", "--verbose"], "--verbose belongs before the command, as in: tunekit --verbose plan"),
        (
            ["adapter", "show", "x", "--debug"],
            "--debug belongs before the command, as in: tunekit --debug adapter show",
        ),
        (
            ["train", "x.yaml", "--quie"],
            "No such option: --quie; write a key of the recipe without dashes, as KEY=VALUE",
        ),
        (["train", "x.yaml", "--resum"], "No such option: --resum (Possible options: --resume)"),
        (
            ["train", "x.yaml", "--lr", "1e-4"],
            "No such option: --lr; write a key of the recipe without dashes, as KEY=VALUE",
        ),
        (["schema", "--epochs"], "No such option: --epochs"),
        (["train", "x.yaml", "--device"], "Option '--device' requires an argument"),
    ],
)
def test_an_option_of_the_program_after_a_command_is_told_its_place(
    words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *words) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"{expected}; for help: ")
    assert line.count("\n") == 1
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert run(monkeypatch, *words) == 2
    assert capsys.readouterr().err == ""  # the main rank prints it


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(SMALL, encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    return path


def test_validate_says_so_and_prints_rewrites(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "validate", str(recipe), "num_epochs=2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["command line: num_epochs -> training.epochs", f"{recipe}: valid", CHECKED]


def test_problems_go_to_stderr_a_line_each(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(f"{SMALL}training:\n  epoch: 3\n  seed: x\n", encoding="utf-8")
    assert run(monkeypatch, "validate", str(recipe)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"{recipe}:5: training.epoch: unknown key; did you mean 'epochs'?",
        f"{recipe}:6: training.seed: must be a whole number, not 'x'",
    ]


def test_validate_refuses_what_cannot_be_obeyed(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "validate", str(recipe), "model.family=diffusion") == 2
    assert capsys.readouterr().err.startswith("command line: model.family: sft trains models of the family causal")


def test_validate_looks_for_every_file_that_the_recipe_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "other.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    (tmp_path / "folder").mkdir()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: ./folder\n"
        "data:\n  train:\n  - org/rows\n  - rows.jsonl\n  - empty.jsonl\n  - other.jsonl\n"
        "  eval: folder\n  chat_template: absent.jinja\n"
        "adapter: {init_from: folder}\noutput: {dir: out}\n",
        encoding="utf-8",
    )
    assert run(monkeypatch, "validate", str(recipe)) == 2
    said = capsys.readouterr().err.replace(str(tmp_path), "").splitlines()
    said.sort(key=lambda line: int(line.split(":")[1]))
    format_of_other = said.pop(3)
    assert format_of_other.startswith(
        "/recipe.yaml:7: data.train.3.path: /other.jsonl:1: the first row has 'question', "
    )
    assert (
        "write {path: FILE, columns: {question: prompt, answer: completion}} in the recipe, or add to --data: "
        in format_of_other
    )
    assert said == [
        "/recipe.yaml:1: model.name_or_path: /folder: contains no model; check the path, or write a hub name",
        "/recipe.yaml:5: data.train.1.path: /rows.jsonl: no such file; check data.train and data.eval",
        "/recipe.yaml:6: data.train.2.path: /empty.jsonl: the file is empty; add rows to it, or name another file",
        "/recipe.yaml:8: data.eval.0.path: /folder: this folder contains no data files, no recordings and no "
        "images; name a file, or files with a pattern such as FOLDER/*.jsonl, or put metadata.jsonl or one folder per "
        "class into it",
        "/recipe.yaml:9: data.chat_template: /absent.jinja: no such file; check the path",
        "/recipe.yaml:10: adapter.init_from: /folder: contains no adapter (adapter_config.json); check the path",
    ]
    assert run(monkeypatch, "validate", str(recipe), f"model={tmp_path}/m.gguf") == 2
    assert "command line: model.name_or_path: " in capsys.readouterr().err


def test_validate_in_json(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "validate", str(recipe), "num_epochs=2", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out) == {
        "valid": True,
        "problems": [],
        "notes": ["command line: num_epochs -> training.epochs"],
    }
    assert run(monkeypatch, "validate", str(recipe), "num_epochs=2", "training.sed=1", "--json", "-") == 2
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["valid"], found["problems"][0]["key"], found["notes"]) == (
        False,
        "training.sed",
        ["command line: num_epochs -> training.epochs"],
    )
    assert err.splitlines() == [*found["notes"], "command line: training.sed: unknown key; did you mean 'seed'?"]
    assert run(monkeypatch, "validate", str(recipe), "--json", str(recipe.parent / "absent" / "x.json")) == 2


@pytest.mark.drawn
def test_something_is_said_within_a_second_on_a_terminal(recipe: Path) -> None:
    """Before anything heavy is imported, and on a terminal only."""
    main_end, other_end = pty.openpty()
    command = [sys.executable, "-m", "tunekit", "plan", str(recipe)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=other_end) as process:
        first = os.read(main_end, 100)
        process.kill()
    command[-1] = "absent.yaml"  # another rank prints nothing
    other = os.environ | {"RANK": "1", "LOCAL_RANK": "1"}
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=other_end, env=other, check=False)
    assert not select.select([main_end], [], [], 0)[0]
    os.close(other_end)
    os.close(main_end)
    assert first.split() == [b"loading", b"..."]
    assert "loading" not in call("eval", "./absent").stderr


@pytest.mark.drawn
def test_json_on_standard_output_is_alone_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(shipped_recipes()["smoke"]), f"output.dir={tmp_path / 'run'}"]
    found = {}
    for verb in ("plan", "train"):
        assert run(monkeypatch, verb, *words, "--json", "-") == 0
        out, err = capsys.readouterr()
        found[verb] = json.loads(out)
        assert "steps" in err
    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    assert found["train"] == report
    assert report["model"].items() <= found["plan"]["model"].items()  # what is not known is left out of a report
    recipe = found["plan"]["recipe"]
    assert (report["method"], report["objective"]) == (recipe["adapter"]["method"], "sft")
    assert report["seed"] == recipe["training"]["seed"]
    assert report["learning_rate"] == recipe["training"]["learning_rate"]


def test_less_or_more_is_said_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(LOUDNESS, "")  # which main() sets
    words = [str(shipped_recipes()["smoke"]), f"output.dir={tmp_path / 'run'}", "training.max_steps=2"]
    words.append("~training.epochs")
    assert run(monkeypatch, "-q", "train", *words) == 0
    assert capsys.readouterr() == ("", "")
    assert run(monkeypatch, "--quiet", "runs", str(tmp_path)) == 0
    assert "finished" in capsys.readouterr().out, "what was asked for is no note"
    assert run(monkeypatch, "-q", "train", *words) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert run(monkeypatch, "-v", "train", *words, "--overwrite") == 0
    assert re.search(r"^seconds: data [\d.]+, .*train [\d.]+", capsys.readouterr().out, re.MULTILINE)
    with quiet():
        assert logging.getLogger("transformers").getEffectiveLevel() < logging.CRITICAL
    monkeypatch.setenv(LOUDNESS, "")
    with quiet():
        assert logging.getLogger("transformers").getEffectiveLevel() == logging.CRITICAL


@pytest.mark.parametrize(("verbose", "level"), [(False, "ERROR"), (True, "WARNING")])
def test_warnings_of_torchs_code_in_c_are_for_verbose(
    verbose: bool, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warning about a lost rank has twenty lines of stack frames, and comes before tunekit's own message."""
    for name in (LOUDNESS, *variables()):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    context: Any = SimpleNamespace()
    start(context, verbose=verbose)
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == level
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")
    start(context, verbose=verbose)
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == "INFO", "the user's own value stays"


@pytest.mark.parametrize(
    "words", [["~training.epochs", "training.max_steps=-1"], ["training.max_steps=-1", "~training.epochs"]]
)
def test_overrides_are_no_options(
    words: list[str], recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "validate", str(recipe), *words) == 2
    assert capsys.readouterr().err == "command line: training.max_steps: must be at least 1, not -1\n"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RecipeError.of([Problem("a", file="x", line=1), Problem("b", "c")]), 2, "x:1: a\nb; c\n"),
        (NumericsError("loss is not finite"), 3, "loss is not finite\n"),
        (ResourceError("no memory"), 4, "no memory\n"),
        (Stopped("stopped", 15), 143, "stopped\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (MemoryError(), 4, "memory ran out; free memory, or lower "),  # merge and export have no batch size
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 4, "/x/y: no space left"),
        (OSError(errno.ENOSPC, "No space left on device", "/from", None, "/to"), 4, "/to: no space left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/x/y"), 4, "/x/y: "),
        (OSError(errno.EFBIG, "File too large", "/x/y"), 4, "/x/y: "),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "/x: Permission denied"),
        (BrokenPipeError(), 141, ""),
        (KeyError("x\ny"), 1, "this is a bug in tunekit: KeyError: 'x\\ny'; run `tunekit --debug ...`"),
        (RecursionError(), 1, "this is a bug in tunekit: RecursionError; run"),
        (ValueError("token hf_abcdefghijkl"), 1, "this is a bug in tunekit: ValueError: token [secret]; run"),
    ],
)
def test_whatever_happens_becomes_words_and_a_code(
    error: BaseException,
    code: int,
    words: str,
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(*values: object) -> None:
        raise error

    monkeypatch.setattr(tunekit.validate, "validate_verb", fail)
    monkeypatch.setattr(os, "dup2", lambda *values: None)
    assert run(monkeypatch, "validate", str(recipe)) == code
    err = capfd.readouterr().err
    assert err.startswith(words)
    assert "Traceback" not in err
    if not isinstance(error, BrokenPipeError):
        assert run(monkeypatch, "--debug", "validate", str(recipe)) == code
        err = capfd.readouterr().err
        assert "Traceback" in err
        assert "hf_abcdefghijkl" not in err


def imported_by(*words: str) -> tuple[int, str, list[str]]:
    """The exit code of `tunekit WORDS` in a process of its own, what it complained of, and what it had imported."""
    program = (
        "import sys, atexit\n"
        f"sys.argv = ['tunekit', *{list(words)!r}]\n"
        "def show(): print('\\nMODULES', *sys.modules)\n"
        "atexit.register(show)\n"
        "from tunekit.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr, done.stdout.rpartition("MODULES")[2].split()


def test_an_old_run_is_in_the_way_before_anything_heavy_is_imported(recipe: Path) -> None:
    run_folder = Path(load_recipe(recipe).recipe.output.dir)
    run_folder.mkdir(parents=True)
    (run_folder / "plan.json").write_text("{}", encoding="utf-8")
    code, complaint, modules = imported_by("train", str(recipe))
    assert code == 2
    assert f"{run_folder} already holds a run (plan.json); continue it with --resume" in complaint
    assert "--overwrite" in complaint
    assert [name for name in modules if name.startswith(HEAVY)] == []


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["--version"], ["validate", "RECIPE"], ["schema"]])
def test_nothing_heavy_is_imported(words: list[str], recipe: Path) -> None:
    arguments = [str(recipe) if word == "RECIPE" else word for word in words]
    code, _, modules = imported_by(*arguments)
    assert code == 0
    assert "tunekit.cli" in modules
    assert [name for name in modules if name.startswith(HEAVY)] == []


@pytest.mark.parametrize(("words", "most"), [(["--help"], 25), (["validate", "RECIPE"], 126)])
def test_few_modules_are_imported(words: list[str], most: int, recipe: Path) -> None:
    """Half of the time of these commands is imports."""
    code, _, modules = imported_by(*[str(recipe) if word == "RECIPE" else word for word in words])
    assert code == 0
    assert len([name for name in modules if name.startswith("tunekit")]) <= most
    slow = {"psutil", "filelock", "regex", "tunekit.records"}  # each takes as long as twenty modules of ours
    assert not slow & set(modules)
    assert words != ["--help"] or "pydantic" not in modules


def test_the_collector_rarely_scans_what_imports_leave(recipe: Path) -> None:
    program = (
        "import atexit, gc, sys\n"
        f"sys.argv = ['tunekit', 'validate', {str(recipe)!r}]\n"
        "def show(): print('', *(each['collections'] for each in gc.get_stats()), gc.get_freeze_count())\n"
        "atexit.register(show)\n"
        "from tunekit.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *collections, frozen = map(int, done.stdout.split()[-4:])
    assert sum(collections) < 30  # 78 with Python's own settings
    assert frozen > 10_000  # objects that the last collection skips


def test_help_lists_the_verbs_and_every_verb_exists() -> None:
    done = call("--help", COLUMNS="20", TERM="dumb", LC_ALL="C", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    verbs = [
        "validate",
        "plan",
        "preview",
        "train",
        "eval",
        "generate",
        "merge",
        "adapter",
        "recipes",
        "import",
        "init",
        "schema",
    ]
    listed = [
        line.split()[0]
        for line in done.stdout.partition("Commands:")[2].partition("Exit codes:")[0].splitlines()
        if line.strip() and line[2] != " "
    ]
    assert set(verbs) <= set(listed)
    assert listed == [verb for verb in ORDER if verb in listed]  # every command has its place
    assert "..." not in call("--help", COLUMNS="80").stdout.partition("Commands:")[2]  # none is cut
    assert call().stderr.startswith("Usage")


def helps(command: Any, name: str) -> Iterator[tuple[str, str]]:
    """The names and the help, 80 columns wide, of a command and all commands below it."""
    yield name, command.get_help(command.context_class(command, info_name=name, terminal_width=80))
    for word, inner in getattr(command, "commands", {}).items():
        yield from helps(inner, f"{name} {word}")


def test_help_states_what_a_command_accepts() -> None:
    shown = {name: " ".join(text.split()) for name, text in helps(get_command(app), "tunekit")}
    assert "--device cpu start the processes on CPUs" in shown["tunekit launch"]
    assert "cuda" not in shown["tunekit launch"]  # refused there
    assert "Reads only the first row of each file" in shown["tunekit validate"]
    assert "from 0 to 0.5; default: about 200 rows" in shown["tunekit init"]
    assert "[[" not in shown["tunekit init"] + shown["tunekit recipes"]
    assert "a folder of recordings or images" in shown["tunekit generate"]
    assert shown["tunekit generate"].count("with --temperature") == 3
    assert "default: dequantized, or full" in shown["tunekit merge"]


def test_no_help_cuts_a_sentence_or_an_option() -> None:
    for name, text in helps(get_command(app), "tunekit"):
        cut = [line for line in text.splitlines() if line.endswith(("-", " and..."))]
        cut += [line for line in text.partition("Commands:")[2].splitlines() if "..." in line]
        assert not cut, name
        assert not re.search(r" --\S+ <", text), f"{name}: an option without a name for its value"


def test_every_verb_is_a_function_that_takes_what_it_is_given() -> None:
    package = Path(tunekit.validate.__file__).parent
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (package / "commands").glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    homes = {name.name: node.module for node in nodes if isinstance(node, ast.ImportFrom) for name in node.names}
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("_verb")]
    assert len(calls) == 39
    for call in calls:
        name = ast.unparse(call.func)
        tree = ast.parse((package.parent / f"{homes[name]}.py".replace("tunekit.", "tunekit/")).read_text("utf-8"))
        verbs = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
        assert len(verbs) == 1, name
        wanted = verbs[0].args
        names = [argument.arg for argument in wanted.args]
        assert len(call.args) <= len(names), name
        given = {*names[: len(call.args)], *(keyword.arg for keyword in call.keywords)}
        assert set(names[: len(names) - len(wanted.defaults)]) <= given, name
        assert not [value for value in call.args if isinstance(value, ast.Starred)], name


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["validate"], "tunekit validate"),
        (["frobnicate"], "tunekit"),
        (["--frobnicate"], "tunekit"),
        (["data", "frobnicate"], "tunekit data"),
        (["validate", "x.yaml", "--frobnicate"], "tunekit validate"),
        (["preview", "x.yaml", "-n", "0"], "tunekit preview"),
        (["launch", "x.yaml", "--nodes", "x"], "tunekit launch"),
    ],
)
def test_a_wrong_use_is_one_line(
    words: list[str], command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *words) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert re.search(rf"; for help: .*{command.partition(' ')[2]} -h\n$", text)


@pytest.mark.drawn
def test_usage_errors() -> None:
    done = call("validate", "absent.yaml")
    assert (done.returncode, done.stderr) == (2, "absent.yaml: no such file; `tunekit init` writes a first recipe\n")


@pytest.mark.drawn
def test_a_reader_that_leaves_is_no_fault() -> None:
    shell = f"{sys.executable} -m tunekit schema | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.stdout == "{"
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # 0 where the pipe took everything before its reader left
    closed = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m tunekit schema >&-"], capture_output=True, text=True, check=False
    )
    assert (closed.returncode, closed.stderr) == (0, "")


def test_a_link_that_leads_to_itself_is_no_fault(tmp_path: Path) -> None:
    (loop := tmp_path / "loop").symlink_to("loop")
    with pytest.raises((RuntimeError, OSError)) as caught:  # a RuntimeError before Python 3.13
        loop.resolve(strict=sys.version_info >= (3, 13))
    text, code = exit_message(caught.value)
    assert (text, code) == (f"{loop}: Too many levels of symbolic links; check the path and its permissions", 2)


def test_names_outside_ascii_on_a_plain_terminal(tmp_path: Path) -> None:
    path = tmp_path / "rezept-ü.yaml"
    path.write_text("modell: ä\n", encoding="utf-8")
    done = call("validate", str(path), LC_ALL="C", PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert "unknown key; did you mean 'model'?" in done.stderr


def test_init_writes_a_valid_recipe_and_never_over_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "init") == 0
    text = Path("recipe.yaml").read_text(encoding="utf-8")
    Path("train.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    assert run(monkeypatch, "validate", "recipe.yaml") == 0
    assert run(monkeypatch, "init") == 2
    assert "recipe.yaml: exists already" in capsys.readouterr().err
    assert Path("recipe.yaml").read_text(encoding="utf-8") == text
    assert run(monkeypatch, "init", "--output", "absent/x.yaml") == 2


def test_an_invented_key_is_no_key_of_the_other_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (theirs := tmp_path / "theirs.yaml").write_text(
        "base_model: m\nsequence_len: 9\ndatasets: [{path: a.jsonl, type: alpaca}]\nadapter: lora\n"
        "frobnicate_level: 3\nlora_alhpa: 8\n"
    )
    assert run(monkeypatch, "import", str(theirs)) == 2
    err = capsys.readouterr().err
    known = "is not a known key of Axolotl, and would be lost"
    assert f"theirs.yaml:5: frobnicate_level: {known}; correct its name, or remove it\n" in err
    assert f"theirs.yaml:6: lora_alhpa: {known}; did you mean 'lora_alpha'? otherwise remove it\n" in err


@pytest.mark.parametrize("words", [["import"], ["validate"], ["train"]])
@pytest.mark.parametrize(("name", "text"), [("a.jsonl", '{"text": "a"}\n{}'), ("a.csv", "text\na"), ("a.json", "[{}]")])
def test_a_file_of_rows_is_no_recipe(
    words: list[str],
    name: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (rows := tmp_path / name).write_text(text)
    assert run(monkeypatch, *words, str(rows)) == 2
    err = capsys.readouterr().err
    assert err.endswith(f"; `tunekit init {rows}` reads it, and writes a recipe for it\n")
    assert err.count("\n") == 1


def test_another_tools_configuration_becomes_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, ours = tmp_path / "theirs.yaml", tmp_path / "new" / "ours.yaml"
    ours.parent.mkdir()
    theirs.write_text(
        "model_name_or_path: Qwen/Qwen3-0.6B\ntemplate: qwen3\nstage: sft\nfinetuning_type: lora\nlora_rank: 4\n"
        "dataset: rows.jsonl\nmax_samples: 500\ndataset_text_field: body\nplot_loss: true\noverwrite_cache: true\n"
        "preprocessing_num_workers: 16\nnum_train_epochs: 2\noutput_dir: out\nlr_scheduler_type: cosine_with_min_lr\n"
        "lr_scheduler_kwargs: {min_lr_rate: 0.2}\n",
        encoding="utf-8",
    )
    assert run(monkeypatch, "import", str(theirs), "--output", str(ours)) == 0
    said = capsys.readouterr().err
    for line in (
        "theirs.yaml:2: template -> nothing (the tokenizer's own template is used; `tunekit preview` shows it)",
        "theirs.yaml:7: max_samples -> data.train.0.max_rows",
        "theirs.yaml:7: max_samples -> data.train.0.draw_seed: null",
        "theirs.yaml:9: plot_loss -> nothing (every step is logged)",
        "theirs.yaml:11: preprocessing_num_workers -> nothing (rows are cached by their content)",
    ):
        assert line in said
    titles = [line for line in said.splitlines() if not line.startswith(" ")]
    own = f"{theirs}: a configuration of LLaMA-Factory"
    defaults = "defaults of the other tool, now written in the recipe:"
    assert titles == [own, "changed:", "without effect here:", defaults, "nothing is lost"]
    assert load_recipe(ours).recipe == check_draft(*read_draft(theirs, imported=True)).recipe
    assert load_recipe(ours).rewrites == []
    source = load_recipe(ours).recipe.data.train[0]
    assert source.draw_seed is None, "LLaMA-Factory takes the first rows"
    assert (source.path, source.max_rows, source.columns) == (str(tmp_path / "rows.jsonl"), 500, {"body": "text"})
    text = ours.read_text(encoding="utf-8")
    assert "weight_decay" not in text, "defaults are not written out"
    assert run(monkeypatch, "import", str(theirs), "--output", str(ours)) == 2
    assert ours.read_text(encoding="utf-8") == text
    theirs.write_text(f"{theirs.read_text(encoding='utf-8')}deepspeed: zero3.json\nchat_template: vicuna\n")
    capsys.readouterr()
    assert run(monkeypatch, "import", str(theirs)) == 2
    out, err = capsys.readouterr()
    assert "#   chat_template: vicuna\n" in out, "the draft, with what is lost in comments"
    assert "  r: 4\n" in out
    assert "theirs.yaml:5: lora_rank -> adapter.r" in err, "what was rewritten is shown while problems stand"
    assert err.index("without effect here:") < (lost := err.index("these keys are lost, or need a decision:"))
    assert lost < err.index("theirs.yaml:16:")
    assert "theirs.yaml:16: deepspeed: is a key of another tool and would be lost" in err
    assert "theirs.yaml:17: chat_template: tunekit does not know the template 'vicuna'" in err


def test_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "schema") == 0
    printed = json.loads(capsys.readouterr().out)
    assert run(monkeypatch, "schema", "--output", str(tmp_path / "s.json")) == 0
    assert json.loads((tmp_path / "s.json").read_text(encoding="utf-8")) == printed
    assert run(monkeypatch, "schema", "--reference") == 0
    assert "learning_rate" in capsys.readouterr().out


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_is_shown_and_copied_with_its_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = shipped_recipes()[name]
    assert run(monkeypatch, "recipes", name) == 0
    assert capsys.readouterr().out == shipped.read_text(encoding="utf-8")
    assert run(monkeypatch, "recipes", name, "--copy", str(tmp_path / "mine.yaml")) == 0
    assert capsys.readouterr().out.startswith(f"wrote {tmp_path / 'mine.yaml'}\n")
    copied = load_recipe(tmp_path / "mine.yaml").recipe
    for source in load_recipe(shipped).recipe.data.train:
        if Path(source.path).is_file():
            copy = tmp_path / Path(source.path).relative_to(shipped.parent)
            assert str(copy) in [each.path for each in copied.data.train]
            assert copy.read_bytes() == Path(source.path).read_bytes()


def test_shipped_recipes_are_listed_and_a_copy_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = shipped_recipes()
    names = list(shipped)
    assert run(monkeypatch, "recipes") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines if line.startswith("  ")) == sorted(names)
    assert [line for line in lines if line.startswith("objective: ")][:2] == [
        "objective: audio_classify",
        "objective: classify",
    ]
    first = tmp_path / names[0] / "mine.yaml"
    for _ in range(2):
        assert run(monkeypatch, "recipes", names[0], "--copy", str(first)) == 0, "the same again changes nothing"
    first.write_text("mine\n", encoding="utf-8")
    assert run(monkeypatch, "recipes", names[0], "--copy", str(first)) == 2
    assert first.read_text(encoding="utf-8") == "mine\n"
    shutil.rmtree(tmp_path / names[0])
    capsys.readouterr()
    assert run(monkeypatch, "recipes", names[0][:-1]) == 2
    assert f"did you mean '{names[0]}'?" in capsys.readouterr().err


def test_objects_are_collected_as_usual_while_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line puts collection off for the imports; the loop must not run that way."""
    import tunekit.train
    from tunekit.__main__ import WHILE_STARTING

    def stop(*_: object) -> None:
        raise Reached

    class Reached(Exception):
        pass

    before = gc.get_threshold()
    run = SimpleNamespace(train=stop)
    plan = SimpleNamespace(choice=SimpleNamespace(threads=None))
    monkeypatch.setattr(tunekit.train, "plan_session", lambda *_: (plan, None))
    monkeypatch.setattr(begin, "print_plan", lambda *_: None)
    monkeypatch.setattr(begin, "check_run", lambda *_: {})
    monkeypatch.setattr(begin, "load_base", lambda *_: None)
    monkeypatch.setattr(begin, "assemble_run", lambda *_: run)
    try:
        gc.set_threshold(*WHILE_STARTING)
        session = SimpleNamespace(signals=SimpleNamespace(at_once=lambda _: nullcontext()), folder=None)
        with pytest.raises(Reached):
            tunekit.train.train_session(session, False)
        assert gc.get_threshold() == begin.ORDINARY_COLLECTION
    finally:
        gc.set_threshold(*before)
