"""A command reads its recipe once: what was checked is what the verb works on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.objectives.test_grpo import write_prompts
from tests.support.train_case import write_recipe
from tests.test_cli import run
from tunekit.recipe import load

COMMANDS = {
    "validate": ["validate", "RECIPE"],
    "plan": ["plan", "RECIPE"],
    "preview": ["preview", "RECIPE"],
    "train": ["train", "RECIPE", "training.epochs=1"],
    "a dry run": ["train", "RECIPE", "--dry-run"],
    "data check": ["data", "check", "RECIPE"],
    "reward check": ["reward", "check", "RECIPE", "--samples", "0"],
    "eval": ["eval", "RECIPE"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_recipe_is_read_once(
    name: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "reward check":
        code = "def letters(prompts, completions, **columns):\n    return [0.0] * len(completions)\n"
        recipe = write_prompts(tmp_path, tiny_llama, code=code)
    else:
        recipe = write_recipe(tmp_path, tiny_llama, rows=12)
    paths: list[Path] = []

    def read(path: Path) -> object:
        paths.append(path)
        return original(path)

    original = load.read_recipe_file
    for module in [module for key, module in sys.modules.items() if key.startswith("tunekit.")]:
        if getattr(module, "read_recipe_file", None) is original:
            monkeypatch.setattr(module, "read_recipe_file", read)
    code = run(monkeypatch, *(str(recipe) if word == "RECIPE" else word for word in COMMANDS[name]))
    assert code == 0 or "check" in name, capsys.readouterr().err  # a check ends with 2 where it finds something
    assert paths == [recipe]
