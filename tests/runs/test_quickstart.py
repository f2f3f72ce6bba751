"""The quickstart's claim, with the real model: its answers are learned from its labels, and from nothing else."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from tunekit.evaluate import evaluate_verb
from tunekit.recipe.load import load_recipe
from tunekit.recipe.reading.shipped import shipped_folder
from tunekit.train import train_verb

pytestmark = pytest.mark.slow

RECIPE = shipped_folder() / "quickstart.yaml"
TRAIN = shipped_folder() / "data" / "orders" / "train.jsonl"


def exact_match(target: Path, output: Path, overrides: Sequence[str] = ()) -> float:
    """Share of the test rows answered to the letter."""
    evaluate_verb(str(target), None, None, None, ["exact_match"], str(output), list(overrides))
    result = json.loads(output.read_text())
    assert result["rows"] == 60
    return float(result["exact_match"])


def write_shuffled(target: Path) -> Path:
    """The training rows with the answers dealt anew."""
    rows = [json.loads(line) for line in TRAIN.read_text("utf-8").splitlines()]
    answers = [row["messages"][-1]["content"] for row in rows]
    random.Random(0).shuffle(answers)
    for row, answer in zip(rows, answers, strict=True):
        row["messages"][-1]["content"] = answer
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return target


def test_the_untuned_model_fails(smollm2: Path, tmp_path: Path) -> None:
    assert exact_match(RECIPE, tmp_path / "before.json", [f"model.name_or_path={smollm2}"]) < 0.1


@pytest.mark.parametrize("shuffled", [False, True], ids=["true-labels", "shuffled-labels"])
def test_training_teaches_what_the_labels_say(smollm2: Path, tmp_path: Path, shuffled: bool) -> None:
    overrides = [f"model.name_or_path={smollm2}", f"output.dir={tmp_path / 'run'}"]
    if shuffled:
        overrides.append(f"data.train={write_shuffled(tmp_path / 'shuffled.jsonl')}")
    train_verb(load_recipe(RECIPE, overrides), False, False)
    result = exact_match(tmp_path / "run", tmp_path / "after.json")
    assert result < 0.1 if shuffled else result > 0.85
