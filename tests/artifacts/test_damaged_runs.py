"""A damaged run folder is named, and hides no other; what its files hold can neither slow nor command a terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.run_case import write_run
from tunekit.console.text import visible
from tunekit.errors import RunFolderError
from tunekit.recipe.reading.dump import yaml_scalar
from tunekit.report import report_verb
from tunekit.runs import runs_verb
from tunekit.watch import watch_verb

DEEP = "[" * 100_000


def changed(name: str, **changes: Any) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        values = json.loads((run / name).read_text("utf-8"))
        (run / name).write_text(json.dumps(values | changes), "utf-8")

    return damage


def line(**changes: Any) -> Callable[[Path], None]:
    """Another second line of metrics.jsonl; a change to None removes the key."""

    def damage(run: Path) -> None:
        first, second, *rest = (run / "metrics.jsonl").read_text("utf-8").splitlines(keepends=True)
        values = {key: value for key, value in (json.loads(second) | changes).items() if value is not None}
        (run / "metrics.jsonl").write_text("".join([first, json.dumps(values) + "\n", *rest]), "utf-8")

    return damage


def written(name: str, content: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        (run / name).write_text(content)

    return damage


def folder_instead(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink() or (run / name).mkdir()


def pipe_instead(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink() or os.mkfifo(run / name)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "no loss": line(loss=None),
    "text as loss": line(loss="2.5"),
    "a huge loss": line(loss=10**400),
    "no step": line(step=None),
    "deep metrics": written("metrics.jsonl", DEEP + "\n{}\n"),
    "a folder as metrics": folder_instead("metrics.jsonl"),
    "a pipe as metrics": pipe_instead("metrics.jsonl"),
    "a deep plan": written("plan.json", DEEP),
    "a pipe as status": pipe_instead("status.json"),
    "a plan that is a list": written("plan.json", "[]"),
    "no recipe in the plan": changed("plan.json", recipe=3),
    "a peak without its total": changed("plan.json", peak_bytes={"weights": 1}),
    "a report of texts": changed("report.json", reactions=[{}], final_step="last", seconds={"train": "long"}),
    "a seed that is a list": changed("plan.json", recipe={"training": {"seed": [1]}}),
    "rows that are not there": changed("evaluation_rows.json", units=[], losses=[], rows=[]),
    "half a surrogate pair": changed("plan.json", notes=["\ud800"]),
}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_run_hides_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    damaged, good = write_run(tmp_path / "bad"), write_run(tmp_path / "good", seed=1)
    damage(damaged)
    runs_verb(str(tmp_path), None)
    shown = capsys.readouterr()
    assert "good" in shown.out
    assert "bad" in shown.out + shown.err
    code = report_verb([str(damaged), str(good)], str(tmp_path / "page.html"), None, None)
    shown = capsys.readouterr()
    assert "good" in shown.out
    assert ("it is left out" in shown.err) == (code == 2)
    assert "good" in (tmp_path / "page.html").read_text("utf-8")
    if code:
        with pytest.raises(RunFolderError, match="damaged"):
            report_verb([str(damaged)], None, None, None)


@pytest.mark.parametrize("name", ["metrics.jsonl", "plan.json"])
def test_a_damaged_run_that_is_watched_is_named(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run")
    (line(learning_rate=None) if name == "metrics.jsonl" else written(name, DEEP))(run)
    with pytest.raises(RunFolderError, match=r"run is damaged|cannot be read"):
        watch_verb(str(run), None)


def test_a_folder_named_in_bytes_that_are_no_utf8_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # the path is not folded
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    write_run(Path(name))
    runs_verb(str(tmp_path), str(tmp_path / "runs.json"))
    assert "caf" in capsys.readouterr().out
    assert report_verb([name], None, None, None) == 0
    assert "caf\\xe9" in (Path(name) / "report.html").read_text("utf-8")


def test_of_a_huge_recipe_only_the_start_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / "recipe.yaml").open("w") as file:
        file.write("first: line\n" + "#" * 5_000_000 + "\nlast: line\n")
    assert report_verb([str(run)], None, None, None) == 0
    page = (run / "report.html").read_text("utf-8")
    assert "first: line" in page
    assert "only the start of the file is shown" in page
    assert "last: line" not in page


def test_characters_that_reorder_text_do_not_reach_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run\u202egnp")
    changed("status.json", exit_code=2, reason="stopped \u2066 here \u2069")(run)
    runs_verb(str(tmp_path), None)
    report_verb([str(run)], None, None, None)
    shown = capsys.readouterr().out
    controls = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    assert "\\u202e" in shown
    assert not set(controls) & set(shown)
    assert not set(controls) & set(visible(controls) + yaml_scalar(controls))
