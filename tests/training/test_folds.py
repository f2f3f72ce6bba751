"""The folds of a cross-validation: every row in one of them, equal sizes, equal rows and groups together."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tunekit.errors import DataError, RunFolderError
from tunekit.recipe.reading.trial_recipes import LoadedSweep, fold_file, load_sweep
from tunekit.training.folds import write_folds

RECIPE = """\
model: org/base
objective: {objective}
data: {{train: {sources}}}
output: {{dir: run}}
sweep: {{folds: {count}}}
"""


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def loaded(folder: Path, sources: str, count: int, *overrides: str, objective: str = "sft") -> LoadedSweep:
    text = RECIPE.format(sources=sources, count=count, objective=objective)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    (folder / "run").mkdir(exist_ok=True)
    return load_sweep(str(folder / "recipe.yaml"), overrides)


def divided(sweep: LoadedSweep, resume: bool = False) -> list[list[list[dict[str, Any]]]]:
    """The rows of each fold, by source."""
    recipe, folder = sweep.loaded.recipe, sweep.loaded.recipe.output.dir
    write_folds(recipe, sweep.section, Path(folder), resume)
    return [
        [
            [json.loads(line) for line in Path(fold_file(folder, source, fold)).read_text("utf-8").splitlines()]
            for fold in range(1, (sweep.section.folds or 0) + 1)
        ]
        for source in range(len(recipe.data.train))
    ]


def test_each_row_is_in_one_fold_and_equal_rows_are_together(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {at % 40}", "completion": "yes"} for at in range(50)]
    (tmp_path / "a.jsonl").write_text(lines(rows), encoding="utf-8")
    (tmp_path / "b.csv").write_text("q,a\n" + "".join(f"{at},{at}\n" for at in range(7)), encoding="utf-8")
    sources = "[a.jsonl, {path: b.csv, columns: {q: prompt, a: completion}}]"
    first, second = divided(loaded(tmp_path, sources, 5))
    assert sorted(row["prompt"] for fold in first for row in fold) == sorted(row["prompt"] for row in rows)
    assert [len(fold) for fold in first] == [10] * 5
    places = [{row["prompt"] for row in fold} for fold in first]
    assert sum(map(len, places)) == 40
    assert sorted(map(len, second)) == [1, 1, 1, 2, 2]
    assert sorted(row["prompt"] for fold in second for row in fold) == [str(at) for at in range(7)]
    assert divided(loaded(tmp_path, sources, 5)) == [first, second]
    assert divided(loaded(tmp_path, sources, 5, "training.seed=1")) != [first, second]


def test_labels_and_groups(tmp_path: Path) -> None:
    rows = [{"text": f"text {at}", "label": "rare" if at < 4 else "usual", "source": f"p{at % 9}"} for at in range(40)]
    (tmp_path / "a.jsonl").write_text(lines(rows), encoding="utf-8")
    (folds,) = divided(loaded(tmp_path, "a.jsonl", 4, objective="classify"))
    assert [Counter(row["label"] for row in fold) for fold in folds] == [Counter(usual=9, rare=1)] * 4
    (groups,) = divided(loaded(tmp_path, "a.jsonl", 3, "sweep.fold_group=source", objective="classify"))
    people = [{row["source"] for row in fold} for fold in groups]
    assert sum(map(len, people)) == 9
    assert max(map(len, groups)) - min(map(len, groups)) <= 5


def test_files_of_rows_are_named_from_the_folder_of_their_table(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    rows = [{"image": f"{at}.png", "label": "cat"} for at in range(4)]
    (tmp_path / "photos" / "metadata.jsonl").write_text(lines(rows), encoding="utf-8")
    (folds,) = divided(loaded(tmp_path, "photos", 2, objective="image_classify"))
    names = sorted(row["image"] for fold in folds for row in fold)
    assert names == [str(tmp_path / "photos" / f"{at}.png") for at in range(4)]


def test_rows_that_cannot_be_divided(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"text": "one"}, {"text": "two"}]), encoding="utf-8")
    with pytest.raises(DataError, match="too few different rows for 3 folds"):
        divided(loaded(tmp_path, "a.jsonl", 3))
    with pytest.raises(DataError, match=r"a.jsonl:1: has no column 'who' \(1 more: line 2\)"):
        divided(loaded(tmp_path, "a.jsonl", 2, "sweep.fold_group=who"))
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(DataError, match=r"b.jsonl:2"):
        divided(loaded(tmp_path, "b.jsonl", 2))


def test_a_resume_refuses_other_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"text": str(at)} for at in range(6)]), encoding="utf-8")
    sweep = loaded(tmp_path, "a.jsonl", 2)
    first = divided(sweep)
    assert divided(sweep, resume=True) == first
    (tmp_path / "a.jsonl").write_text(lines([{"text": str(at)} for at in range(7)]), encoding="utf-8")
    with pytest.raises(RunFolderError, match="differ from the rows in the interrupted sweep"):
        divided(sweep, resume=True)
    assert divided(sweep) != first


def test_equal_values_are_together_however_they_are_written(tmp_path: Path) -> None:
    """A number of a JSON file equals its text in a CSV file; the order of a row's columns does not matter."""
    (tmp_path / "a.jsonl").write_text(lines([{"text": f"{at}", "who": at % 3} for at in range(9)]), encoding="utf-8")
    (tmp_path / "b.csv").write_text("text,who\n" + "".join(f"t{at},{at % 3}\n" for at in range(9)), encoding="utf-8")
    first, second = divided(loaded(tmp_path, "[a.jsonl, b.csv]", 3, "sweep.fold_group=who"))
    assert [{str(row["who"]) for row in fold} for fold in first] == [{row["who"] for row in fold} for fold in second]
    pairs = [{"prompt": f"{at}", "completion": "yes"} for at in range(6)]
    turned = [dict(reversed(pair.items())) for pair in pairs]
    (tmp_path / "c.jsonl").write_text(lines([*pairs, *turned]), encoding="utf-8")
    (folds,) = divided(loaded(tmp_path, "c.jsonl", 3))
    assert [len({row["prompt"] for row in fold}) for fold in folds] == [2] * 3


def test_refused_folds_leave_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"text": "one"}, {"text": "two"}]), encoding="utf-8")
    with pytest.raises(DataError, match="too few different rows for 3 folds"):
        divided(loaded(tmp_path, "a.jsonl", 3))
    assert list((tmp_path / "run").iterdir()) == []


def test_folds_of_a_refused_sweep_are_replaced(tmp_path: Path) -> None:
    """Otherwise files of the earlier number of folds stay."""
    rows = [{"text": f"row {at}"} for at in range(12)]
    (tmp_path / "a.jsonl").write_text(lines(rows), encoding="utf-8")
    for count in (4, 2):
        divided(loaded(tmp_path, "a.jsonl", count))
        assert len(list((tmp_path / "run" / "folds").iterdir())) == count
