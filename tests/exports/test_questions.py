"""The rows on which exports are compared with torch."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.support.train_case import train_in_child, write_recipe
from tunekit.exports.questions import make_questions, row_ids
from tunekit.targets.exportable import make_exportable
from tunekit.targets.target import find_target


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
