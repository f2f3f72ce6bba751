"""Measured figures in the documents: each is filled in from scripts/results/all.json, or its section has a date.

`scripts/bench/run all` is run here on benchmarks of a temporary folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
BENCH = REPOSITORY / "scripts" / "bench"
CODE = re.compile(r"^```\w+.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)  # a fence without a language is an output
SPEED = re.compile(r"\d ?(tok/s|tokens?/s\b|tokens per second|(tokens|rows) per CPU second|CPU seconds|times as fast)")
AMOUNT = re.compile(r"\d ?(MB|GB|MiB|GiB|%|min\b|s\b|seconds?)")
DATE = re.compile(r"\b20\d\d-\d\d-\d\d\b")
BENCHMARK = """
import json, sys
from pathlib import Path
FIGURES = {
    "minutes": 2, "options": "--json $RESULTS/one.json", "result": "one.json",
    "figures": {
        "speed": {"what": "of a test", "unit": "rows", "digits": 1, "ours": "sides/us/0", "theirs": "sides/{best}/0"},
    },
}
if __name__ == "__main__":
    count = Path(sys.argv[2]).with_name("count")
    number = int(count.read_text()) + 1 if count.exists() else 1
    count.write_text(str(number))
    sides = {"us": [10.0 * number], "them, fast": [5]}
    Path(sys.argv[2]).write_text(json.dumps({"best": "them, fast", "sides": sides}))
"""


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """scripts/bench/all.py."""
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location("bench_all", BENCH / "all.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCH))


def sections(text: str) -> Iterator[str]:
    """The parts of a page between headings, without code."""
    yield from re.split(r"^#+ ", CODE.sub("", text), flags=re.MULTILINE)


def is_measured(section: str) -> bool:
    """Whether a section quotes a measured figure."""
    return bool(SPEED.search(section) or (re.search(r"\b[Mm]easured\b", section) and AMOUNT.search(section)))


def test_each_quoted_figure_is_the_newest_measurement(bench: ModuleType) -> None:
    declared, measured = bench.declarations(BENCH), bench.Measurements(bench.RESULTS)
    quotations = 0
    for file in bench.documents():
        text = file.read_text(encoding="utf-8")
        quotations += len(bench.QUOTED.findall(text))
        assert text.count("<!--figure") == text.count("<!--/figure") == len(bench.QUOTED.findall(text)), file
        assert bench.filled(text, declared, measured) == text, f"{file}: run `scripts/bench/run all --page`"
    assert quotations > 10
    assert (bench.RESULTS / "all.md").read_text(encoding="utf-8") == bench.page(declared, measured)


def test_a_section_with_measured_figures_has_a_date(bench: ModuleType) -> None:
    files = bench.documents()
    undated = [
        f"{file.relative_to(REPOSITORY)}: {section.splitlines()[0]}"
        for file in files
        for section in sections(file.read_text(encoding="utf-8"))
        if is_measured(section) and not DATE.search(section)
    ]
    assert undated == []


def test_results_name_no_place_of_the_machine_that_measured(bench: ModuleType) -> None:
    files = [file for kind in ("json", "md", "svg") for file in bench.RESULTS.glob(f"*.{kind}")]
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    assert len(texts) > 20
    assert [file.name for file, text in texts.items() if re.search(r"/(root|home|tmp|Users)/", text)] == []


def test_the_search_knows_a_measured_figure() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (quickstart,) = (part for part in sections(readme) if part.startswith("The quickstart"))
    assert is_measured(quickstart)
    assert not is_measured("Packing\nRows are packed up to 2048 tokens; `memory.budget: 8GiB`.")


@pytest.fixture
def place(tmp_path: Path, bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one benchmark, `results`, and a page that quotes it."""
    (tmp_path / "one.py").write_text(BENCHMARK, encoding="utf-8")
    (tmp_path / "results").mkdir()
    (tmp_path / "page.md").write_text("- fast: <!--figure one.speed ours-->?<!--/figure--> rows\n", encoding="utf-8")
    monkeypatch.setattr(bench, "documents", lambda: [tmp_path / "page.md"])
    return tmp_path


def call(bench: ModuleType, place: Path, code: str, **settings: Any) -> int:
    defaults = {"minutes": 10.0, "only": None, "again": False}
    return int(bench.run_all(argparse.Namespace(**{**defaults, **settings}), place, place / "results", code))


def test_the_result_of_a_direct_call_is_added_once(bench: ModuleType, place: Path) -> None:
    """It has its own date, and does not replace a measurement with this code."""
    declared, measured = bench.declarations(place), bench.Measurements(place / "results")
    sides = {"us": [7.0], "them": [5]}
    result = {"best": "them", "sides": sides}
    facts = {"date": "2026-11-02 10:00", "processor": "slow", "load": 2.5}
    for more in ({}, {"sides": {**sides, "facts": facts}, "other": {"date": "2026-10-01"}}, {"date": "2026-11-01"}):
        (place / "results" / "one.json").write_text(json.dumps({**result, **more}), encoding="utf-8")
        bench.add_results(declared, measured)
        bench.add_results(declared, measured)
    (record,) = measured.of("one")
    assert (record["date"], record["processor"], record["load"]) == ("2026-11-02 10:00", "slow", 2.5)
    assert record["figures"] == {"speed": {"ours": 7.0, "theirs": 5}}
    assert call(bench, place, "code") == 0
    assert len(measured.__class__(place / "results").of("one")) == 2


def test_measurements_are_kept_and_resumed(bench: ModuleType, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(bench, place, "a", minutes=1.0) == 0
    assert "takes 2 minutes, 1 are left" in capsys.readouterr().out
    assert call(bench, place, "a") == 0
    assert call(bench, place, "a") == 0
    assert "measured with this code" in capsys.readouterr().out
    assert (place / "page.md").read_text(
        encoding="utf-8"
    ) == "- fast: <!--figure one.speed ours-->10.0<!--/figure--> rows\n"
    assert call(bench, place, "b") == 0
    records = json.loads((place / "results" / "all.json").read_text(encoding="utf-8"))
    assert [each["figures"]["speed"] for each in records] == [{"ours": 10.0, "theirs": 5}, {"ours": 20.0, "theirs": 5}]
    assert all(each["processor"] and each["date"] and each["versions"]["torch"] for each in records)
    line = (place / "results" / "all.md").read_text(encoding="utf-8").splitlines()[-1]
    assert line.startswith("| one.speed: of a test | rows | 20.0 | 5.0 | 4.00 | ")
    assert f"2.00 ({records[0]['date'][:10]}" in line
    assert call(bench, place, "b", again=True) == 0
    assert "-->30.0<!--" in (place / "page.md").read_text(encoding="utf-8")


def test_a_failure_is_told_and_the_other_benchmarks_run(
    bench: ModuleType, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "two.py").write_text(BENCHMARK.replace("count = Path", "sys.exit(3); count = Path").replace("one", "two"))
    (place / "three.py").write_text(BENCHMARK.replace("$RESULTS/one", "$NOT_SET/one"))
    (place / "four.py").write_text(BENCHMARK.replace("$RESULTS/one", "$RESULTS/other"))
    assert call(bench, place, "a") == 2
    out = capsys.readouterr().out
    assert "two: failed: exit code 3" in out
    assert "three: set NOT_SET" in out
    assert "four: failed: it wrote no new one.json" in out
    assert [each["benchmark"] for each in bench.Measurements(place / "results").records] == ["one"]


def test_a_figure_that_nobody_measured_is_refused(bench: ModuleType, place: Path) -> None:
    with pytest.raises(KeyError, match="never measured"):
        bench.write_documents(bench.declarations(place), bench.Measurements(place / "results"))


def test_every_test_that_a_result_names_exists(bench: ModuleType) -> None:
    named = [
        (file, function)
        for page in bench.RESULTS.glob("*.md")
        for file, function in re.findall(r"\b(tests/[\w/]+\.py)::(test_\w+)", page.read_text(encoding="utf-8"))
    ]
    assert len(named) > 50
    texts = {file: (REPOSITORY / file).read_text(encoding="utf-8") for file, _ in named}
    assert [f"{file}::{function}" for file, function in named if f"def {function}(" not in texts[file]] == []
