"""Paths are relative to the recipe file, and a dumped recipe reads back equal from wherever it is written."""

from __future__ import annotations

import json
import ntpath
import os
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.recipe.test_reader import SMALL, problems_of
from tunekit.errors import RecipeError
from tunekit.recipe.bases import paths as marks
from tunekit.recipe.bases.paths import is_like_path, last_name
from tunekit.recipe.bases.sample_settings import RewardSource
from tunekit.recipe.load import load_recipe
from tunekit.recipe.reading import paths
from tunekit.recipe.reading.draft import Draft
from tunekit.recipe.reading.dump import dump_recipe, yaml_scalar
from tunekit.recipe.reading.overrides import apply_overrides
from tunekit.recipe.reading.paths import named_paths, relative_path, resolve_paths
from tunekit.recipe.reading.shorthands import expand_shorthands
from tunekit.recipe.reading.yaml_reader import read_yaml
from tunekit.recipe.recipe import Recipe
from tunekit.validate import validate

ALL_PATHS = """\
model: {model}
data:
  train: [rows.jsonl, org/dataset, ../up.csv, ./local, $HOME/x.jsonl]
  eval: eval/rows.parquet
  chat_template: template.jinja
adapter: {{init_from: old/adapter}}
output: {{dir: runs/first}}
"""


def load(folder: Path, text: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path).recipe


def test_relative_to_the_recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    recipe = load(tmp_path, ALL_PATHS.format(model="org/model"))
    assert [source.path for source in recipe.data.train] == [
        str(tmp_path / "rows.jsonl"),
        "org/dataset",
        str(tmp_path.parent / "up.csv"),
        str(tmp_path / "local"),
        str(tmp_path / "$HOME" / "x.jsonl"),
    ]
    assert recipe.data.chat_template == str(tmp_path / "template.jinja")
    assert recipe.adapter.init_from == str(tmp_path / "old" / "adapter")
    assert recipe.output.dir == str(tmp_path / "runs" / "first")
    assert recipe.model.name_or_path == "org/model"


def test_a_run_folder_is_continued_from_its_adapter(tmp_path: Path) -> None:
    text = "model: org/model\ndata: {train: rows.jsonl}\nadapter: {init_from: sft}\noutput: {dir: run}\n"
    (tmp_path / "sft").mkdir()
    assert load(tmp_path, text).adapter.init_from == str(tmp_path / "sft")
    (tmp_path / "sft" / "plan.json").write_text("{}", encoding="utf-8")
    assert load(tmp_path, text).adapter.init_from == str(tmp_path / "sft" / "adapter")


def test_of_the_command_line_relative_to_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = tmp_path / "shell"
    (shell / "base").mkdir(parents=True)
    monkeypatch.chdir(shell)
    path = tmp_path / "recipe.yaml"
    path.write_text(ALL_PATHS.format(model="org/model"), encoding="utf-8")
    overrides = [
        "model=base",
        "data.train.0=new.jsonl",
        "data.eval=[{path: ../e.csv}]",
        "adapter.r=4",
        "output_dir=out",
    ]
    recipe = load_recipe(path, [*overrides, "chat_template_path=t.jinja"]).recipe
    assert recipe.model.name_or_path == str(shell / "base")
    assert recipe.data.train[0].path == str(shell / "new.jsonl")
    assert recipe.data.train[3].path == str(tmp_path / "local")
    assert isinstance(recipe.data.eval, tuple)
    assert recipe.data.eval[0].path == str(tmp_path / "e.csv")
    assert recipe.data.chat_template == str(shell / "t.jinja")
    assert recipe.adapter.init_from == str(tmp_path / "old" / "adapter"), (
        "what the file says stays relative to the file"
    )
    assert recipe.output.dir == str(shell / "out")


def test_a_name_that_exists_beside_the_recipe_is_local(tmp_path: Path) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert load(tmp_path, ALL_PATHS.format(model="org/model")).model.name_or_path == str(tmp_path / "org" / "model")
    assert load(tmp_path, ALL_PATHS.format(model="m.gguf")).model.name_or_path == str(tmp_path / "m.gguf")


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert load(tmp_path, ALL_PATHS.format(model="~/models/m")).model.name_or_path == "/somewhere/models/m"


def test_a_recipe_reached_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(tmp_path, SMALL)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_recipe("../recipe.yaml").recipe.output.dir == str(tmp_path / "out")


def test_every_local_file_of_a_recipe_must_be_there(tmp_path: Path) -> None:
    objective = "objective: {{method: {}}}\n"
    rewards = "[{function: scores.py:f, allow_code: true}, {model: scorer}]"
    for line, keys in {
        objective.format("distill, teacher: ./teacher"): {"objective.teacher.name_or_path"},
        objective.format(f"grpo, reward: {rewards}"): {"objective.reward.0.function", "objective.reward.1.model"},
        objective.format("dreambooth, class_prompt: a dog, class_data_dir: made"): set(),
    }.items():
        path = tmp_path / "recipe.yaml"
        text = ALL_PATHS.format(model="./model").replace("train: [rows.jsonl, ", "train: [org/rows, ")
        path.write_text(text.replace("../up.csv, ./local, $HOME/x.jsonl", "org/more") + line, encoding="utf-8")
        with pytest.raises(RecipeError) as caught:
            validate(str(path))
        found = {problem.key for problem in caught.value.problems} - {"data.eval.0.path"}
        assert found == {"model.name_or_path", "data.chat_template", "adapter.init_from"} | keys


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("'" + "x" * 256 + "'", "is too long for a file name"),
        ("'" + "x/" * 2100 + "'", "is too long"),
        ('""', "must not be"),
    ],
)
def test_impossible_names(name: str, words: str, tmp_path: Path) -> None:
    assert words in problems_of(SMALL.replace("dir: out", f"dir: {name}"), tmp_path)[0]


def test_dumped_recipes_read_back_equal_elsewhere(tmp_path: Path) -> None:
    recipe = load(tmp_path, ALL_PATHS.format(model="../models/m"))
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    text = dump_recipe(recipe, folder)
    assert str(tmp_path) not in text, "an absolute path would not survive moving the folder"
    assert load(folder, text) == recipe
    assert Recipe.model_validate(json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe


@given(
    st.text(st.characters(codec="utf-8"), max_size=40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.integers()
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_scalars_read_back_as_themselves(value: str | float | int) -> None:
    if isinstance(value, str):
        value = value.replace("\0", "")  # refused on reading
    if isinstance(value, int) and abs(value) >= 10**300:
        return
    found = read_yaml(yaml_scalar(value), "x").values
    assert found == value
    assert type(found) is type(value)


ON_WINDOWS = {  # as written -> as the file D:\\work\\recipe.yaml means it
    r"C:\data\x.jsonl": r"C:\data\x.jsonl",
    "C:/data/x.jsonl": r"C:\data\x.jsonl",
    r"..\up.csv": r"D:\up.csv",
    r"sub\x.jsonl": r"D:\work\sub\x.jsonl",
    r"\\host\share\rows": r"\\host\share\rows",
    r".\folder": r"D:\work\folder",
    "org/dataset": "org/dataset",
}
REWARDED = r"""
model: C:\models\base
data: {train: C:\data\x.jsonl, eval: ['D:\x.csv']}
objective: {method: grpo, reward: {function: C:\rewards\score.py:length, allow_code: true}}
output: {dir: E:\runs\first}
"""


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of `os` that take paths apart are those of Windows; there is no file."""
    names = {**vars(ntpath), "lexists": lambda path: False, "expanduser": lambda path: path}
    system = SimpleNamespace(path=SimpleNamespace(**names), fsencode=os.fsencode)
    for module in (paths, marks):
        monkeypatch.setattr(module, "os", system)
    monkeypatch.setattr(marks, "Path", PureWindowsPath)


def draft_of(text: str) -> Draft:
    draft = read_yaml(text, "recipe.yaml")
    expand_shorthands(draft)
    resolve_paths(draft, cast("Path", PureWindowsPath(r"D:\work")))
    return draft


@pytest.mark.parametrize("written", ON_WINDOWS)
@pytest.mark.parametrize("form", ["data: {{train: '{}'}}", "data: {{train: [{{path: {}}}]}}", "data:\n  train: {}"])
def test_rows_with_a_drive_and_backslashes(windows: None, written: str, form: str) -> None:
    assert draft_of(form.format(written)).get(("data", "train", 0, "path")) == ON_WINDOWS[written]


def test_every_path_may_have_a_drive(windows: None) -> None:
    draft = draft_of(REWARDED)
    assert draft.get(("model", "name_or_path")) == r"C:\models\base"
    assert draft.get(("data", "eval", 0, "path")) == r"D:\x.csv"
    assert draft.get(("output", "dir")) == r"E:\runs\first"
    reward = draft.get(("objective", "reward", 0, "function"))
    assert reward == r"C:\rewards\score.py:length"
    (code,) = [path for path in named_paths(draft.values) if path.mark.expected == "code"]
    assert (str(code.file), RewardSource(function=reward, allow_code=True).function_name) == (
        r"C:\rewards\score.py",
        "length",
    )
    assert draft.problems == []
    apply_overrides(draft, [r"output.dir=C:\other", r"training.seed=3"])
    assert draft.get(("output", "dir")) == r"C:\other"


def test_a_path_on_another_drive_is_written_whole(windows: None) -> None:
    assert relative_path(r"C:\data\x.jsonl", cast("Path", r"D:\work")) == r"C:\data\x.jsonl"
    assert relative_path(r"D:\work\in\x.jsonl", cast("Path", r"D:\work")) == "./in/x.jsonl"
    assert relative_path(r"D:\x.jsonl", cast("Path", r"D:\work")) == "../x.jsonl"
    assert read_yaml(f"path: {yaml_scalar(chr(67) + ':' + chr(92) + 'x')}", "r").values == {"path": "C:\\x"}


def test_a_backslash_in_double_quotes_is_explained(tmp_path: Path) -> None:
    (problem,) = problems_of('output: {dir: "C:\\data"}\n', tmp_path)
    assert "after a backslash in double quotes; use single quotes, or / in paths" in problem
    (problem,) = problems_of('model: a\ndata: {train: x.jsonl}\noutput: {dir: "C:\\runs"}\n', tmp_path)
    assert problem == (
        "recipe.yaml:3: output.dir: contains the character U+000D; in double quotes a backslash begins an escape: use "
        "single quotes, or / in paths"
    )


def test_what_begins_as_a_path_is_no_name_on_the_hub() -> None:
    names = ("org/name", "name", "a/b.c")
    assert not any(map(is_like_path, names))
    assert all(map(is_like_path, ("./a", "../a", "/a", "~/a", r".\a", r"C:\a", "c:/a", r"\\host\a", ".")))
    assert [last_name(path) for path in (r"C:\a\base", "C:/a/base", "/a/base")] == ["base"] * 3
