"""YAML is read the way people mean it, and every file that is no recipe ends in one line with its place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunekit.errors import RecipeError
from tunekit.recipe.load import load_recipe
from tunekit.recipe.reading.yaml_reader import LARGEST_FILE_BYTES, read_scalar, read_yaml

SMALL = "model: m\ndata: {train: rows.jsonl}\noutput: {dir: out}\n"


def problems_of(data: bytes | str, folder: Path, *overrides: str) -> list[str]:
    path = folder / "recipe.yaml"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    lines = [str(problem).replace(f"{path}", "recipe.yaml") for problem in caught.value.problems]
    assert all("\n" not in line and len(line) < 600 for line in lines)
    return lines


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E4", 1e4),
        ("1e+4", 1e4),
        (".5", 0.5),
        ("5.", 5.0),
        ("010", 10),
        ("08", 8),
        ("0o10", 8),
        ("0x1F", 31),
        ("-3", -3),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        ("no", "no"),
        ("Off", "Off"),
        ("y", "y"),
        ("yes", "yes"),
        ("true", True),
        ("True", True),
        ("FALSE", False),
        ("tRUE", "tRUE"),
        ("~", None),
        ("", None),
        ("null", None),
        ("1e400", float("inf")),
        ("-.inf", float("-inf")),
        ("9" * 5000, float("inf")),
        ("0x" + "f" * 5000, float("inf")),
        ("1.2.3", "1.2.3"),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    found = read_scalar(text)
    assert found == value
    assert type(found) is type(value)


def test_quoted_scalars_are_text() -> None:
    assert read_yaml('["1", \'2\', "true", !!str 3]', "x").values[:3] == ["1", "2", "true"]
    assert read_yaml("|\n  1\n", "x").values == "1\n"


def test_reading_leaves_pyyaml_as_it_is() -> None:
    before = {key: list(rules) for key, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()}
    read_yaml("a: 1e-4\nb: no\n", "x")
    assert before == yaml.SafeLoader.yaml_implicit_resolvers
    assert yaml.safe_load("no") is False


@pytest.mark.parametrize(
    "data", [SMALL, "\ufeff" + SMALL, SMALL.replace("\n", "\r\n"), "---\n" + SMALL + "...\n", SMALL[:-1]]
)
def test_a_small_recipe_in_any_encoding_of_lines(data: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(data.encode())
    assert load_recipe(path).recipe.output.dir == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("", "recipe.yaml: the file is empty"),
        ("# nothing\n", "recipe.yaml: the file is empty"),
        ("- a\n", "recipe.yaml: the recipe is a list, not a mapping"),
        ("text\n", "recipe.yaml: the recipe is a single value, not a mapping"),
        ("0\n", "recipe.yaml: the recipe is a single value, not a mapping"),
        (SMALL + "---\n" + SMALL, "recipe.yaml:4: a second YAML document starts here"),
        (SMALL.encode("utf-16"), "recipe.yaml: is UTF-16"),
        (SMALL.encode() + b"memory: \xff\n", "recipe.yaml:4: is not UTF-8 text here"),
        (SMALL + "a: b\0c\n", "recipe.yaml:4: the character U+0000 is not allowed in YAML"),
        (SMALL + 'memory: {budget: "a\\0b"}\n', "recipe.yaml:4: memory.budget: contains the character U+0000"),
        (SMALL + 'memory: {budget: "\\ud800"}\n', "recipe.yaml:4: memory.budget: contains the character U+D800"),
        (SMALL + "memory:\n\tbudget: 1\n", "recipe.yaml:5: not valid YAML: a tab cannot indent"),
        (SMALL + "memory: {\n", "recipe.yaml:5: not valid YAML"),
        (SMALL + "x: " + "[" * 3000, "recipe.yaml:4: is nested more than 20 levels deep"),
        (SMALL + "x: " + "{a: " * 3000, "recipe.yaml:4: is nested more than 20 levels deep"),
        (SMALL + "? [a, b]\n: 1\n", "recipe.yaml:4: a key must be a name"),
        (SMALL + "output: {dir: b}\n", "recipe.yaml:4: output: is written twice (first in line 3)"),
        (SMALL + "<<: {a: 1}\n", "recipe.yaml:4: <<: merge keys (<<) are not allowed"),
        (SMALL + "memory: &here {budget: null}\n", "recipe.yaml:4: memory: the anchor &here is not allowed"),
        (SMALL + "memory: *here\n", "recipe.yaml:4: memory: the alias *here is not allowed"),
        (SMALL + "memory: !!python/object:os.system {}\n", "recipe.yaml:4: memory: the tag tag:yaml.org,2002:python/"),
        (SMALL + "memory: &m [*m]\n", "recipe.yaml:4: memory: the anchor &m is not allowed"),
        (SMALL + "1: x\n", "recipe.yaml:4: 1: unknown key"),
        (SMALL + "training: {seed: " + "9" * 5000 + "}\n", "recipe.yaml:4: training.seed: must be a whole number"),
        (SMALL + "training: {learning_rate: .nan}\n", "recipe.yaml:4: training.learning_rate: must be a finite number"),
    ],
)
def test_no_recipe(data: bytes | str, expected: str, tmp_path: Path) -> None:
    assert any(line.startswith(expected) for line in problems_of(data, tmp_path)), problems_of(data, tmp_path)


def test_a_billion_laughs_are_refused_at_once(tmp_path: Path) -> None:
    rows = ["x0: &x0 [a]"] + [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 40)]
    assert any("alias" in line for line in problems_of(SMALL + "\n".join(rows), tmp_path))


def test_files_that_are_no_files(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.yaml"
    os.mkfifo(fifo)
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (LARGEST_FILE_BYTES + 1))
    for path, words in [
        (tmp_path, "is a folder"),
        (fifo, "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path / "absent.yaml", "no such file"),
        (loop, "cannot be read"),
        (large, "larger than 1 MiB"),
        (Path("a\0b"), "cannot be read"),
        (Path("x" * 300), "cannot be read"),
    ]:
        with pytest.raises(RecipeError, match=words):
            load_recipe(path)
