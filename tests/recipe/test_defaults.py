"""Learning rates that nobody wrote: an adapter's published one, named with its source wherever the run is told of."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tests.support.plans import make_plan
from tests.support.train_case import write_recipe
from tunekit.recipe.bases.section import AdapterSettings
from tunekit.recipe.load import LoadedRecipe, dump_recipe, load_recipe
from tunekit.recipe.reading.names import known_names, settings_class
from tunekit.recipe.reading.schema import make_reference

RATES = {
    name: rate
    for name in known_names("adapters")
    if (rate := settings_class("adapters", name).default_learning_rate) is not None  # type: ignore[attr-defined]
}
IA3 = "training.learning_rate 0.005: the default of ia3 (huggingface/peft, method_comparison/MetaMathQA/experiments/"


def written(folder: Path, text: str, *overrides: str) -> LoadedRecipe:
    path = folder / "recipe.yaml"
    path.write_text(f"model: m\ndata: {{train: d.jsonl}}\noutput: {{dir: run}}\n{text}", encoding="utf-8")
    return load_recipe(path, overrides)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", RATES)
def test_an_adapter_brings_its_rate(name: str, tmp_path: Path) -> None:
    loaded = written(tmp_path, f"adapter: {name}\n")
    assert loaded.recipe.training.learning_rate == RATES[name].value
    (line,) = loaded.defaults
    assert line.startswith(f"training.learning_rate {RATES[name].value:g}: the default of {name} (")
    assert RATES[name].source in line
    assert f"training.learning_rate is {RATES[name].value:g} by default ({RATES[name].source})" in make_reference()


@pytest.mark.parametrize(
    ("text", "overrides", "rate"),
    [
        ("", (), 2e-4),
        ("adapter: {method: lora, r: 4}\n", (), 2e-4),
        ("adapter: ia3\ntraining: {learning_rate: 1e-4}\n", (), 1e-4),
        ("adapter: ia3\ntraining: {seed: 1}\n", ("learning_rate=1e-4",), 1e-4),
        ("adapter: ia3\ntraining: {learning_rate: 1e-4}\n", ("~training.learning_rate",), 5e-3),
        ("", ("adapter.method=ia3",), 5e-3),
        ("adapter: ia3\n", ("adapter.method=lora",), 2e-4),
    ],
)
def test_what_is_written_wins(text: str, overrides: tuple[str, ...], rate: float, tmp_path: Path) -> None:
    loaded = written(tmp_path, text, *overrides)
    assert loaded.recipe.training.learning_rate == rate
    assert bool(loaded.defaults) == (rate == 5e-3)


def test_the_published_comparison_of_the_issue() -> None:
    assert {name: RATES[name].value for name in ("ia3", "prompt", "prefix")} == {
        "ia3": 5e-3,
        "prompt": 1e-3,
        "prefix": 5e-3,
    }
    assert "lora" not in RATES  # the recipe's own default is LoRA's
    assert AdapterSettings.default_learning_rate is None


def test_the_recipe_as_run_holds_the_rate(tmp_path: Path) -> None:
    loaded = written(tmp_path, "adapter: ia3\n")
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "recipe.yaml").write_text(dump_recipe(loaded.recipe, tmp_path / "again"), encoding="utf-8")
    again = load_recipe(tmp_path / "again" / "recipe.yaml")
    assert again.recipe == loaded.recipe
    assert again.defaults == []


def test_plan_says_where_the_rate_comes_from(tmp_path: Path, tiny_llama: Path) -> None:
    path = write_recipe(tmp_path / "recipe", tiny_llama)
    loaded = load_recipe(path, ["~adapter", "adapter.method=ia3", "~training.learning_rate"])
    plan, _ = make_plan(loaded, device=torch.device("cpu"))
    assert [note for note in plan.notes if note.startswith(IA3)]
    assert json.loads(json.dumps(asdict(plan)))["recipe"]["training"]["learning_rate"] == 5e-3
