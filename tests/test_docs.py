"""The documentation: what its pages show runs, what it says of commands is so, and its links lead somewhere.

Models are tiny twins of those that the pages name, and a run has three steps; all else is as the page has it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from tests.exports.conftest import installed  # noqa: F401 (a fixture: llama.cpp's converter, or the test is skipped)
from tests.runs.test_shipped_recipes import twins  # noqa: F401 (a fixture)
from tests.support.train_case import in_child
from tunekit import errors
from tunekit.cli import app, main
from tunekit.recipe.bases.section import Section
from tunekit.recipe.evaluation import EvaluationSection
from tunekit.recipe.load import load_recipe
from tunekit.recipe.output import OutputSection
from tunekit.recipe.reading.names import known_names, settings_class
from tunekit.recipe.reading.shipped import shipped_recipes
from tunekit.recipe.training import TrainingSection
from tunekit.records import ReportFacts, StepRecord

REPOSITORY = Path(__file__).resolve().parent.parent
SITE = REPOSITORY / "scripts" / "site"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(tunekit [^`]+)`")
ELSEWHERE = {  # commands of the pages that other tests run, or that would change this machine
    "git clone REPOSITORY tunekit",
    "git clone REPOSITORY tunekit && cd tunekit",
    "scripts/quickstart",
    "cd tunekit",
    "scripts/setup",
    "scripts/test",
    "source .venv/bin/activate",
    "tunekit --install-completion",
}
PROGRAM: Any = get_command(app)
QUICK = "index.md"
SEARCHED = {  # words that people type, and the page that the search must list
    "OOM": "guide/out-of-memory",
    "12GB": "guide/cards",
    "ner": "tutorials/token-classify",
    "GGUF": "guide/elsewhere",
    "SLURM": "guide/cluster",
    "lm-eval": "guide/evaluating",
    "wandb": "guide/trackers",
    "licence": "guide/privacy",
    "license": "guide/privacy",
}
SMALL = ["training.max_steps=3", "training.gradient_accumulation_steps=2", "data.max_length=512"]


@dataclass(frozen=True)
class Page:
    """A page by its name below the site, or README.md."""

    name: str
    text: str

    @property
    def lines(self) -> list[str]:
        """The command lines of its blocks."""
        blocks = [body for language, _, body in BLOCK.findall(self.text) if language == "sh"]
        return [line.partition("  #")[0].strip() for body in blocks for line in body.splitlines() if line.strip()]


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The written and the generated pages."""
    folder = tmp_path_factory.mktemp("site") / "pages"
    runpy.run_path(str(SITE / "generate.py"))["write"](folder)
    return folder


def written_pages() -> list[Page]:
    files = {file.relative_to(SITE / "pages").as_posix(): file for file in sorted((SITE / "pages").rglob("*.md"))}
    files |= {"other-tools.md": SITE / "other-tools.md", "README.md": REPOSITORY / "README.md"}
    return [Page(name, file.read_text(encoding="utf-8")) for name, file in files.items()]


PAGES = [page for page in written_pages() if set(page.lines) - ELSEWHERE]


def write_rows(file: Path) -> None:
    """Rows of a user's own, where a page only names their file."""
    question = {"role": "user", "content": "Do you take number 1?"}
    rows = (
        [{**question, "content": f"Do you take number {n}?"}, {"role": "assistant", "content": f"Yes, {n}."}]
        for n in range(60)
    )
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")


def made_small(words: list[str], folder: Path, stand_ins: dict[str, str]) -> list[str]:
    """A command with a tiny base, and three steps where it trains."""
    words = [stand_ins.get(word, word) for word in words]
    recipes = [word for word in words[1:] if word.endswith(".yaml") and (folder / word).is_file()]
    takes = words[0] in ("plan", "train", "sweep", "preview", "validate") or words[1:2] == ["check"]
    if not recipes or not takes:
        return words
    text = (folder / recipes[0]).read_text(encoding="utf-8")
    name = load_recipe(folder / recipes[0]).recipe.model.name_or_path
    overrides = [*SMALL, f"model.name_or_path={stand_ins.get(name, name)}"]
    overrides += ["~training.epochs"] if re.search(r"^  epochs:", text, re.MULTILINE) else []
    overrides += ["training.eval_steps=3"] if re.search(r"^  eval:", text, re.MULTILINE) else []
    overrides += ["evaluation.max_new_tokens=4"] if "generate: true" in text else []
    overrides += ["objective.teacher=builtin:tiny-llama"] if "teacher:" in text else []
    overrides += ["objective.resolution=16", "objective.num_inference_steps=2"] if "  resolution:" in text else []
    written = {_key(word) for word in words}
    return [*words, *(override for override in overrides if _key(override) not in written)]


def _key(override: str) -> str:
    """The key of KEY=VALUE or ~KEY."""
    return override.removeprefix("~").partition("=")[0]


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page.name, marks=[] if page.name == QUICK else pytest.mark.slow) for page in PAGES]
)
def test_what_a_page_shows_runs(
    page: Page,
    twins: dict[str, str],  # noqa: F811
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    write_rows(folder / "train.jsonl")
    for language, title, body in BLOCK.findall(page.text):
        if title and language != "sh":
            (folder / title).write_text(body, encoding="utf-8")
    for number, line in enumerate(page.lines):
        if line in ELSEWHERE:
            continue
        program, *words = shlex.split(line)
        assert program == "tunekit", f"{page.name}: {line}: nothing runs this; name it in ELSEWHERE with who does"
        if "gguf" in words:
            request.getfixturevalue("installed")
        words = made_small(words, folder, twins)

        def work(words: list[str] = words) -> None:
            os.chdir(folder)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdin = os.fdopen(0)  # pytest's own refuses to be read, but `chat` ends at the end of its input
            sys.argv = ["tunekit", *words]
            with pytest.raises(SystemExit) as left:
                main()
            assert not left.value.code, f"exit code {left.value.code}"

        ended = in_child(work, tmp_path / f"{number}.log")
        assert ended.code == 0, f"{page.name}: {line}\n{ended.output}"


def test_every_page_for_users_has_a_command_that_runs() -> None:
    without = {page.name for page in written_pages()} - {page.name for page in PAGES}
    assert without == {"architecture.md", "changelog.md", "gpu.md", "run.md"}


@pytest.mark.parametrize("page", written_pages(), ids=lambda page: page.name)
def test_every_command_that_is_named_exists_with_its_options(page: Page) -> None:
    elsewhere = "".join(body for language, _, body in BLOCK.findall(page.text) if language == "bash")  # not run here
    shown = [line for line in page.lines if line.startswith("tunekit ")]
    shown += re.findall(r"\btunekit [^#\n]*", elsewhere.replace("\\\n", " "))
    for line in {*INLINE.findall(page.text), *shown}:
        assert not unknown_words(line), f"{page.name}: {line}: there is no {unknown_words(line)}"


def unknown_words(line: str) -> list[str]:
    """The commands and options of a `tunekit` line that do not exist."""
    command, options, unknown = PROGRAM, set(), []
    for word in re.split(r"[\s\[\]|]+", line)[1:]:
        options |= {name for part in command.params for name in part.opts} | {"-h", "--help"}
        commands = getattr(command, "commands", {})
        is_option, is_command = word.startswith("--"), bool(commands) and word.isalpha() and word.islower()
        if word in commands:
            command = commands[word]
        elif (is_option and word not in options) or is_command:
            unknown.append(word)
    return unknown


def test_the_files_for_ci_have_jobs_with_commands_of_the_page() -> None:
    page = next(page for page in written_pages() if page.name == "guide/ci.md")
    files = {title: yaml.safe_load(body) for _, title, body in BLOCK.findall(page.text) if title}
    github, gitlab = files["github.yml"], files["gitlab.yml"]
    assert {"pull_request", "workflow_dispatch"} == set(github[True])  # YAML reads `on` as true
    assert github["jobs"]["train"]["needs"] in github["jobs"]
    assert {gitlab[job]["stage"] for job in ("check", "train")} == set(gitlab["stages"])
    steps = [step for job in github["jobs"].values() for step in job["steps"]]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
    lines = [step["run"] for step in steps if "run" in step]
    assert lines == [line for job in ("check", "train") for line in gitlab[job]["script"]]
    assert set(lines) - set(page.lines) == {'pip install "tunekit[data] @ git+$TUNEKIT_URL"'}


def test_every_page_is_in_the_navigation_and_the_other_way_round(pages: Path) -> None:
    def files(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [file for value in values for file in files(value)]  # type: ignore[attr-defined]

    listed = files(yaml.safe_load((SITE / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(listed) == sorted(page.relative_to(pages).as_posix() for page in pages.rglob("*.md"))


def test_the_generated_pages_have_everything_that_has_a_name(pages: Path) -> None:
    def headings(name: str) -> set[str]:
        text = (pages / "reference" / name).read_text(encoding="utf-8")
        return {line.lstrip("# ") for line in text.splitlines() if line.startswith("#")}

    assert {*known_names("adapters"), *known_names("starts")} <= headings("methods.md")
    assert set(known_names("objectives")) <= headings("objectives.md")
    for kind in ("formats", "metrics"):
        text = (pages / "reference" / f"{kind}.md").read_text(encoding="utf-8")
        assert all(f"| <code>{name}</code> |" in text for name in known_names(kind))  # type: ignore[arg-type]
    recipes = (pages / "reference" / "recipes.md").read_text(encoding="utf-8")
    assert all(f"| <code>{name}</code> |" in recipes for name in shipped_recipes())
    said = (pages / "reference" / "errors.md").read_text(encoding="utf-8")
    classes = [each for each in vars(errors).values() if isinstance(each, type)]
    kinds = {each.__name__ for each in classes if issubclass(each, errors.TunekitError)}
    assert kinds - headings("errors.md") <= {"TunekitError"}  # every error has a class of its own
    assert "| exists already | name another file with --output |" in said
    changed = "| {key}: its files have changed since the run |"
    assert f"{changed} restore the files, or train again and rank the new run |" in said
    assert said.count(changed) == 1  # its repair is a variable, which other functions of the file have too
    assert said.count("\n| ") > 400
    assert "name_or_path: HuggingFaceTB/SmolLM2" in (pages / "tutorials" / "sft.md").read_text(encoding="utf-8")


def test_the_page_on_resuming_lists_every_key_that_may_change() -> None:
    text = (SITE / "pages" / "guide" / "resume.md").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if line.startswith("| recipe |"))
    listed = re.findall("`(.+?)`", line)
    sections: dict[str, type[Section]] = {"training": TrainingSection, "output": OutputSection}
    sections["evaluation"] = EvaluationSection
    sections["objective"] = settings_class("objectives", "distill")
    keys = [f"{name}.{key}" for name, owner in sections.items() for key in owner.free_keys]
    assert [key for key in keys if not any(fnmatch(key, shown) for shown in listed)] == []
    assert [shown for shown in listed if not any(fnmatch(key, shown) for key in keys)] == []


def test_errors_of_places_and_resources_have_a_repair(pages: Path) -> None:
    text = (pages / "reference" / "errors.md").read_text(encoding="utf-8")
    for name in ("RunFolderError", "ResourceError"):
        rows = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0].split("\n| ")[2:]
        bare = {row.partition(" | ")[0] for row in rows if not row.partition(" | ")[2].strip(" |\n")}
        assert len(rows) > 3
        assert bare <= {  # the code chooses the repair, so that the page does not know it
            "a process is training {relative to}",
            "this line is not a metrics record",
            "the hub cannot be reached: {LENGTH}",
        }


def test_generated_pages_show_code_as_code(pages: Path) -> None:
    texts = {file.name: file.read_text(encoding="utf-8") for file in (pages / "reference").glob("*.md")}
    assert {name for name, text in texts.items() if "\\`" in text} == set(), "an escaped backtick is shown"
    assert "write at least model, data and output; <code>tunekit init</code> writes" in texts["errors.md"]


def test_generated_pages_speak_in_whole_sentences(pages: Path) -> None:
    recipe, said = ((pages / "reference" / f"{name}.md").read_text(encoding="utf-8") for name in ("recipe", "errors"))
    openings = [section.split("\n\n")[1] for section in recipe.split("\n## ")[1:]]
    assert [each for each in openings if not each.endswith(".")] == []
    assert "going_on" not in said


def test_every_number_of_a_report_is_explained() -> None:
    page = (SITE / "pages" / "reference" / "files.md").read_text(encoding="utf-8")
    names = {field.name for facts in (ReportFacts, StepRecord) for field in fields(facts)} - {"metrics", "headline"}
    assert {name for name in names if not re.search(rf"`{name}[`.]", page)} == set()


def test_a_broken_site_is_noticed(tmp_path: Path) -> None:
    check = runpy.run_path(str(SITE / "check.py"))["faults"]
    (tmp_path / "a.html").write_text('<a href="b.html#there">b</a><a href="https://example.org">out</a><p id="x">')
    (tmp_path / "b.html").write_text('<h1 id="there"><a href="#there">here</a><a href="a.html">a</a>')
    assert check(tmp_path) == []
    (tmp_path / "c.html").write_text(
        '<a href="absent.html">1</a><a href="b.html#nowhere">2</a><script src="https://example.org/x.js"></script>'
        '<link rel="stylesheet" href="//example.org/x.css">'
    )
    (tmp_path / "d.css").write_text("@import 'https://example.org/font.css';")
    assert len(check(tmp_path)) == 5
    (tmp_path / "e.html").write_text("<p>A `key`</p><pre>`uname`</pre><script>`x`</script><p>and <code>code</code>")
    assert [fault for fault in check(tmp_path) if "e.html" in fault] == ["e.html: shows a backtick: A `key`"]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(pages: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is absent: scripts/docs installs it")
    (pages.parent / "mkdocs.yml").write_text((SITE / "mkdocs.yml").read_text(encoding="utf-8"), encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-f", str(pages.parent / "mkdocs.yml")]
    done = subprocess.run([*command, "-d", str(tmp_path / "html")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert runpy.run_path(str(SITE / "check.py"))["faults"](tmp_path / "html") == []
    entries = json.loads((tmp_path / "html" / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    for word, place in SEARCHED.items():
        hits = [
            entry["location"]
            for entry in entries
            if re.search(rf"\b{word}\b", f"{entry['title']} {entry['text']}", re.I)
        ]
        assert any(hit.startswith(place) for hit in hits), f"{word}: {hits}"
