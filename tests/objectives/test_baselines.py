"""The plain baselines of labels and numbers: right where words decide, no better than usual where they do not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.objectives.test_classify import llama as llama
from tests.objectives.test_problem_types import write_recipe
from tunekit.objectives.rows import baselines
from tunekit.objectives.rows.baselines import plain_scores
from tunekit.planning.prepare import prepare
from tunekit.recipe.load import load_recipe


def scores(path: Path) -> dict[str, Any]:
    """The baselines of a recipe's rows."""
    rows = prepare(load_recipe(path), torch.device("cpu")).rows
    found = plain_scores(rows.objective, rows.train, rows.evaluation)
    assert found is not None
    return found


def test_words_decide_several_labels_and_numbers(llama: Path, tmp_path: Path) -> None:
    several = scores(write_recipe(tmp_path, llama, "multi"))
    assert several["metric"] == "micro_f1"
    assert several["label_rows"] == {"good": 24, "bad": 24, "odd": 24}
    assert several["majority"] == pytest.approx(2 * 8 / (14 + 24))  # 14 rows have 24 labels, 8 of them the usual one
    assert several["words"] == 1.0
    numbers = scores(write_recipe(tmp_path, llama, "one"))
    assert numbers["metric"] == "loss"
    assert numbers["words"] < 0.2 * numbers["majority"]


def test_one_label_and_labels_that_do_not_follow_from_words(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(0)
    rows = [{"text": f"{name} so" + " so" * (at % 5), "label": name} for at in range(60) for name in ("good", "bad")]
    path = write_recipe(tmp_path, llama, "multi", objective={"problem_type": "single_label_classification"})

    def measured(some: list[dict[str, str]]) -> dict[str, Any]:
        for name in ("train", "test"):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), "utf-8")
        return scores(path)

    found = measured(rows)
    assert (found["metric"], found["majority"], found["words"]) == ("accuracy", 0.5, 1.0)
    found = measured([{**row, "label": draw.choice(("good", "bad"))} for row in rows])
    assert found["words"] < 0.65
    monkeypatch.setattr(baselines, "MOST_LABELS", 1)  # too many labels for the regression
    assert "words" not in measured(rows)


def test_the_usual_tag_of_each_word(llama: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, llama, "multi", objective={"method": "token_classify"})
    recipe = json.loads(path.read_text("utf-8"))
    recipe["objective"] = {"method": "token_classify"}
    path.write_text(json.dumps(recipe), "utf-8")
    rows = [{"words": ["so", name, "so"], "tags": ["O", f"B-{name}", "O"]} for name in ("good", "bad")] * 4
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    found = scores(path)
    assert (found["metric"], found["majority"], found["words"]) == ("token_accuracy", pytest.approx(2 / 3), 1.0)
