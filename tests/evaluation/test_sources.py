"""Evaluation rows of several sources: the metrics of each, beside those of all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.train_case import records, write_recipe
from tunekit.artifacts.run import ROWS_NAME
from tunekit.evaluate import evaluate_verb
from tunekit.recipe.load import load_recipe
from tunekit.train import train_verb


def write_sources(folder: Path, *names: str) -> list[dict[str, str]]:
    """Two files of prompts and answers, of different lengths."""
    for place, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"prompt": f"{place} {row}", "completion": "ab" * (1 + place + row)} for row in range(5 + place)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return [{"path": name} for name in names]


def evaluated(run: Path) -> list[dict[str, Any]]:
    return [record for record in records(run) if "eval" in record]


@pytest.mark.drawn
def test_each_source_is_measured_as_if_it_were_alone(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = write_sources(tmp_path, "a.jsonl", "b.jsonl")
    metrics = {"metrics": ["loss", "token_accuracy"]}
    recipe = write_recipe(tmp_path, tiny_llama, data={"eval": sources}, evaluation=metrics)
    train_verb(load_recipe(recipe), False, False)
    run = tmp_path / "run"
    last = evaluated(run)[-1]
    assert {name: values["rows"] for name, values in last["sources"].items()} == {"a.jsonl": 5, "b.jsonl": 6}
    for source in sources:
        evaluate_verb(
            str(run), None, None, None, [], str(tmp_path / "e.json"), [f"data.eval={tmp_path / source['path']}"]
        )
        alone = json.loads((tmp_path / "e.json").read_text())
        for name in ("loss", "token_accuracy", "perplexity"):
            assert last["sources"][source["path"]][name] == pytest.approx(alone[name], rel=1e-6)
        assert "sources" not in alone
    report = json.loads((run / "report.json").read_text())
    assert report["evaluations"][-1]["sources"] == last["sources"]
    assert "| b.jsonl | 6 |" in (run / "report.md").read_text()
    assert "By source" in (run / "report.html").read_text()
    rows_of_report = f"tunekit report {run} shows the rows with the highest loss"
    assert rows_of_report not in " ".join(capsys.readouterr().out.split())  # it has those of all sources
    evaluate_verb(str(run), None, None, None, [], str(tmp_path / "both.json"), [])
    assert rows_of_report in " ".join(capsys.readouterr().out.split())
    both = json.loads((tmp_path / "both.json").read_text())
    assert both["sources"]["b.jsonl"]["loss"] == pytest.approx(last["sources"]["b.jsonl"]["loss"], rel=1e-6)
    assert both["loss"] == pytest.approx(last["eval"]["loss"], rel=1e-6)


def test_a_few_answers_are_shown_and_not_scored(tiny_llama: Path, tmp_path: Path) -> None:
    sources = write_sources(tmp_path, "a.jsonl")
    evaluation = {"samples": 2, "max_new_tokens": 3, "best": "eval.loss"}
    once = {"max_steps": 2, "epochs": None, "eval_steps": 2}
    recipe = write_recipe(tmp_path, tiny_llama, data={"eval": sources}, evaluation=evaluation, training=once)
    train_verb(load_recipe(recipe), False, False)
    first, last = evaluated(tmp_path / "run")
    for record in (first, last):
        assert [sample["reference"] for sample in record["samples"]] == ["ab", "abab"]
        assert set(record["eval"]) == {"loss", "perplexity"}
    assert "Answers to the first evaluation rows" in (tmp_path / "run" / "report.md").read_text()


def test_files_of_one_name_are_told_apart(tiny_llama: Path, tmp_path: Path) -> None:
    sources = write_sources(tmp_path, "one/d.jsonl", "two/d.jsonl")
    recipe = write_recipe(tmp_path, tiny_llama, data={"eval": sources}, training={"max_steps": 1, "epochs": None})
    train_verb(load_recipe(recipe), False, False)
    found = evaluated(tmp_path / "run")[-1]["sources"]
    assert {Path(name).parent.name: values["rows"] for name, values in found.items()} == {"one": 5, "two": 6}


def test_a_file_that_is_two_sources_is_measured_twice(tiny_llama: Path, tmp_path: Path) -> None:
    (source,) = write_sources(tmp_path, "d.jsonl")
    sources = [{**source, "max_rows": 2}, source]
    recipe = write_recipe(tmp_path, tiny_llama, data={"eval": sources}, training={"max_steps": 1, "epochs": None})
    train_verb(load_recipe(recipe), False, False)
    found = evaluated(tmp_path / "run")[-1]["sources"]
    assert {name: values["rows"] for name, values in found.items()} == {
        f"{recipe.parent / 'd.jsonl'} (1)": 2,
        f"{recipe.parent / 'd.jsonl'} (2)": 5,
    }


def test_rows_that_count_little_are_ranked_by_their_mean_loss(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, data={"eval": "e.jsonl"}, training={"max_steps": 1, "epochs": None})
    rows = [
        {"prompt": "q", "completion": "ab" * 3 * count, "sample_weight": 1e-3 ** (4 - count)} for count in (1, 2, 3)
    ]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    train_verb(load_recipe(recipe), False, False)
    kept = json.loads((tmp_path / "run" / ROWS_NAME).read_text("utf-8"))
    means = [loss / units for loss, units in zip(kept["losses"], kept["units"], strict=True)]
    assert min(means) > 1
    ordered = [means[each["number"]] for each in kept["worst"]]
    assert ordered == sorted(means, reverse=True)
    assert [each["number"] for each in kept["worst"]] != [2, 1, 0], "the order of the weights"


def test_metrics_of_chosen_answers_are_of_all_rows(tiny_llama: Path, tmp_path: Path) -> None:
    sources = write_sources(tmp_path, "a.jsonl", "b.jsonl")
    evaluation = {"choices": "from_data", "metrics": ["micro_f1"]}
    once = {"max_steps": 1, "epochs": None}
    recipe = write_recipe(tmp_path, tiny_llama, data={"eval": sources}, evaluation=evaluation, training=once)
    train_verb(load_recipe(recipe), False, False)
    last = evaluated(tmp_path / "run")[-1]
    assert "micro_f1" in last["eval"]
    assert all("loss" in values and "micro_f1" not in values for values in last["sources"].values())


def test_one_source_has_no_table_of_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, training={"max_steps": 1, "epochs": None})
    train_verb(load_recipe(recipe), False, False)
    assert all("sources" not in record for record in evaluated(tmp_path / "run"))
