"""The rows on which exports are compared with torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.arithmetic.test_normalise import by_peft
from tests.support.train_case import train_in_child, write_recipe
from tunekit.exports.questions import make_questions, row_ids
from tunekit.targets.exportable import make_exportable
from tunekit.targets.target import find_target


@pytest.mark.drawn
def test_a_full_run_is_compared_on_its_evaluation_rows(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, data={"eval": 0.3}, training={"epochs": 1.0})
    values = yaml.safe_load(recipe.read_text()) | {"adapter": {"method": "full"}}
    recipe.write_text(yaml.safe_dump(values))
    ended = train_in_child(recipe, tmp_path / "run")
    assert ended.code == 0, ended.output
    exportable = make_exportable(find_target(str(tmp_path / "run"), None, []))
    held_out, described = row_ids(exportable, 3, 64, held_out=True)
    trained, _ = row_ids(exportable, 3, 64, held_out=False)
    assert described == "3 evaluation rows of the run"
    assert not any(row in trained for row in held_out)
    questions = make_questions(exportable)
    assert questions.base is None
    assert [len(row) for row in questions.rows[:3]] == [len(row) for row in held_out]


def test_one_row_is_longer_than_a_short_window(tmp_path: Path) -> None:
    """Without it no certificate could show that a program ignores the window."""
    by_peft(tmp_path, "mistral", base={"sliding_window": 200, "max_position_embeddings": 512})
    questions = make_questions(make_exportable(find_target(str(tmp_path / "adapter"), None, ["model.dtype=float32"])))
    assert max(map(len, questions.rows)) == 208
    assert [tuple(answer.shape) for answer in questions.expected] == [(len(row), 270) for row in questions.rows]
