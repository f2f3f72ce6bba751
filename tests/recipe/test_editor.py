"""The schema beside the recipes: the one that the code gives, named by every recipe's first line, and read by the
server that editors use for YAML."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.recipe.language_server import LanguageServer, language_server  # noqa: F401 (a fixture)
from tunekit.files.durable import write_new_text
from tunekit.recipe.reading.schema import schema_text
from tunekit.recipe.reading.shipped import (
    SCHEMA_LINE,
    SCHEMA_MARK,
    SCHEMA_NAME,
    first_comment,
    shipped_folder,
    shipped_recipes,
)
from tunekit.recipes import copy_recipe

RECIPES = shipped_recipes()
PLANTED = [  # what an editor must underline: a text of sft-lora.yaml, what stands there instead, the server's words
    ("training:\n", "training:\n  epoch: 3\n", "epoch is not allowed"),
    ("adapter:\n", "adapter:\n  rank: 8\n", "rank is not allowed"),
    ("objective: sft", "objective: stf", "Value is not accepted"),
    ("learning_rate: 2e-4", "learning_rate: fast", 'Expected "number"'),
    ("max_length: 1024", "max_length: 1", "below the minimum of 2"),
]


def test_the_file_beside_the_recipes_is_what_the_code_gives() -> None:
    written = (shipped_folder() / SCHEMA_NAME).read_text("utf-8")
    assert written == schema_text(), "run: tunekit schema --output recipes/recipe.schema.json"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_begins_with_where_the_schema_is(name: str) -> None:
    first = RECIPES[name].read_text("utf-8").partition("\n")[0]
    assert first.startswith(SCHEMA_MARK)
    place = first.removeprefix(SCHEMA_MARK)
    assert not Path(place).is_absolute()
    assert (RECIPES[name].parent / place).resolve() == shipped_folder() / SCHEMA_NAME
    assert "yaml-language-server" not in first_comment(RECIPES[name])


def test_a_copied_recipe_takes_the_schema_along_and_leaves_another_file_alone(tmp_path: Path) -> None:
    written = copy_recipe(RECIPES["sft-ia3"], tmp_path / "one" / "mine.yaml")
    assert tmp_path / "one" / SCHEMA_NAME in written
    assert (tmp_path / "one" / SCHEMA_NAME).read_text("utf-8") == schema_text()
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / SCHEMA_NAME).write_text("{}")
    assert tmp_path / "two" / SCHEMA_NAME not in copy_recipe(RECIPES["sft-ia3"], tmp_path / "two" / "mine.yaml")
    assert (tmp_path / "two" / SCHEMA_NAME).read_text("utf-8") == "{}"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert not write_new_text(tmp_path / "link", "text")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.slow
def test_an_editor_underlines_nothing_in_a_shipped_recipe(language_server: LanguageServer) -> None:  # noqa: F811
    assert {name: found for name, file in RECIPES.items() if (found := language_server.open(file))} == {}


@pytest.mark.slow
@pytest.mark.parametrize(("text", "planted", "words"), PLANTED)
def test_an_editor_underlines_what_is_wrong(
    text: str,
    planted: str,
    words: str,
    language_server: LanguageServer,  # noqa: F811
    tmp_path: Path,
) -> None:
    copy_recipe(RECIPES["sft-lora"], tmp_path)
    recipe = tmp_path / "sft-lora.yaml"
    whole = recipe.read_text("utf-8")
    assert text in whole
    recipe.write_text(whole.replace(text, planted), encoding="utf-8")
    line = recipe.read_text("utf-8").partition(planted.strip().splitlines()[-1])[0].count("\n") + 1
    (found,) = language_server.open(recipe)
    assert found.startswith(f"{line}: ")
    assert words in found


@pytest.mark.slow
def test_an_editor_offers_keys_and_methods_and_says_what_a_key_means(
    language_server: LanguageServer,  # noqa: F811
    tmp_path: Path,
) -> None:
    shutil.copy(shipped_folder() / SCHEMA_NAME, tmp_path)
    file = tmp_path / "begun.yaml"
    file.write_text(f"{SCHEMA_LINE}\ntraining:\n  lea\nobjective: \n", encoding="utf-8")
    language_server.open(file)
    offered = {item["label"] for item in language_server.at("completion", file, 2, 5)["items"]}
    assert {"learning_rate", "warmup_ratio"} <= offered
    offered = {item["label"] for item in language_server.at("completion", file, 3, 11)["items"]}
    assert {"sft", "dpo", "classify"} <= offered
    whole = tmp_path / "whole.yaml"
    whole.write_text(f"{SCHEMA_LINE}\ntraining:\n  epochs: 3\n", encoding="utf-8")
    language_server.open(whole)
    assert "passes over the training rows" in str(language_server.at("hover", whole, 2, 4)["contents"])
