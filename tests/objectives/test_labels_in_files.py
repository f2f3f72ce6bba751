"""Labels as files have them: numbers, truth values, names of classes in the data set, other names of the column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from transformers import AutoTokenizer

from tests.objectives.test_classify import CPU, classifier, write_recipe
from tests.objectives.test_classify import bert as bert
from tests.objectives.test_classify import llama as llama
from tests.support.plans import make_plan
from tests.support.train_case import train
from tunekit.data.reading.problems import Problems
from tunekit.data.reading.source import read_source
from tunekit.errors import TunekitError
from tunekit.evaluate import evaluate_verb
from tunekit.formats import labels as labels_format
from tunekit.merge import merge_verb
from tunekit.model.load import load_model
from tunekit.recipe.data import Source
from tunekit.recipe.load import load_recipe
from tunekit.recipe.objectives.classify import ClassifySettings

ONCE = {"training": {"epochs": None, "max_steps": 1, "warmup_steps": 0}}


def rows_with(folder: Path, *labels: Any, name: str = "train.jsonl") -> None:
    lines = (json.dumps({"text": f"text {number}", "label": label}) + "\n" for number, label in enumerate(labels))
    (folder / name).write_text("".join(lines), encoding="utf-8")


def plan_of(recipe: Path, *overrides: str) -> Any:
    return make_plan(load_recipe(recipe, list(overrides)), device=CPU)


def test_a_whole_number_is_that_row_of_a_head_without_names(bert: Path, tmp_path: Path) -> None:
    base = classifier(tmp_path / "base", bert)
    recipe = write_recipe(tmp_path, base, **ONCE)
    for name in ("train.jsonl", "test.jsonl"):
        rows_with(tmp_path, 2, 0, 1, 2, 0, 1, name=name)
    plan, prepared = plan_of(recipe)
    assert not plan.refusals
    objective = prepared.rows.objective
    assert objective.facts["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert any("label n is output n of the head" in note for note in plan.notes)
    assert any("the head of the base is kept" in note for note in plan.notes)
    batch = objective.rows.collate([[prepared.rows.train[index]] for index in range(4)])
    assert batch.targets["labels"].tolist() == [2, 0, 1, 2]
    stored = transformers.AutoModelForSequenceClassification.from_pretrained(base).classifier.weight
    assert torch.equal(load_model(prepared.model, device=CPU).net.get_submodule("classifier").weight, stored)
    # A head of peft's without names, of a base without a head: the same, measured by text metrics too.
    run = train(write_recipe(tmp_path / "other", bert, **ONCE))
    (run / "adapter" / "tunekit.json").unlink()
    moved = (run / "adapter").rename(tmp_path / "adapter")
    rows = str(tmp_path / "test.jsonl")
    evaluate_verb(str(moved), str(bert), rows, None, ["accuracy", "exact_match"], str(tmp_path / "e.json"), [])
    found = json.loads((tmp_path / "e.json").read_text("utf-8"))
    assert found["accuracy"] == found["exact_match"]
    assert [line["rows"] for line in found["classes"]["per_class"]] == [2, 2, 2]
    rows_with(tmp_path, 3, name="test.jsonl")
    with pytest.raises(TunekitError, match=r"test\.jsonl.*the label '3' is not among.*leave the row out, or add it"):
        evaluate_verb(str(moved), str(bert), rows, None, [], None, [])


def test_names_of_classes_are_read_from_parquet_and_data_sets(bert: Path, tmp_path: Path) -> None:
    classes = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": classes, "tags": datasets.List(classes)})
    values = {"text": ["a", "b", "c"], "label": [1, 0, -1], "tags": [[1, 0], [], [0]]}
    whole = datasets.Dataset.from_dict(values, features=features)
    whole.to_parquet(tmp_path / "train.parquet")
    whole.save_to_disk(str(tmp_path / "saved"))
    for path in ("train.parquet", "saved"):
        rows = [row.values for row in read_source(Source(path=str(tmp_path / path)), Problems())]
        assert [row["label"] for row in rows] == ["yes", "no", None]
        assert [row["tags"] for row in rows] == [["yes", "no"], [], ["no"]]
    recipe = write_recipe(tmp_path, bert, **ONCE)
    with pytest.raises(
        TunekitError, match=r"train\.parquet.*:3.*'label' must be a text or a number, or a list of them, not null"
    ):
        plan_of(recipe, f"data.train={tmp_path / 'train.parquet'}", "data.eval=null")
    whole.select([0, 1]).to_parquet(tmp_path / "train.parquet")
    _, prepared = plan_of(recipe, f"data.train={tmp_path / 'train.parquet'}", "data.eval=null")
    assert prepared.rows.objective.facts["labels"] == ["no", "yes"]


def test_true_is_one_label_in_every_file(bert: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, bert, **ONCE)
    rows_with(tmp_path, True, False, True)
    (tmp_path / "test.csv").write_text("text,label\na,true\nb,False\nc,TRUE\n", encoding="utf-8")
    _, prepared = plan_of(recipe, f"data.eval={tmp_path / 'test.csv'}")
    assert prepared.rows.objective.facts["labels"] == ["false", "true"]
    assert ClassifySettings.model_validate({"labels": [True, False]}).labels == ("true", "false")
    # A head that was trained with another spelling keeps it.
    base = classifier(tmp_path / "base", bert, "False", "True", "Unknown")
    rows_with(tmp_path, True, False, "Unknown")
    _, prepared = plan_of(recipe, f"model={base}", "data.eval=null")
    assert prepared.rows.objective.facts["labels"] == ["False", "True", "Unknown"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("1 2 1.0 2", r"train\.csv:4: the label '1\.0' is the same number as the label '1' in other rows"),
        ("01 2 1", r"train\.csv:2: the label '01' is the same number as the label '1' in other rows"),
        ("1 no true", r"train\.csv:4: the label 'true' is a boolean, but the label '1' in other rows is a number"),
    ],
)
def test_one_label_in_two_spellings_is_refused(labels: str, message: str, bert: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, bert, **ONCE)
    lines = (f"text {number},{label}\n" for number, label in enumerate(labels.split()))
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(lines), encoding="utf-8")
    with pytest.raises(TunekitError, match=message) as caught:
        plan_of(recipe, f"data.train={tmp_path / 'train.csv'}", "data.eval=null")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("column", ["labels", "category", "intent"])
def test_other_names_of_the_column_are_recognised(column: str, bert: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, bert, **ONCE)
    (tmp_path / "train.csv").write_text(f"text,{column}\na,yes\nb,no\n", encoding="utf-8")
    plan, prepared = plan_of(recipe, f"data.train={tmp_path / 'train.csv'}", "data.eval=null")
    assert prepared.rows.objective.facts["labels"] == ["no", "yes"]
    assert not [note for note in plan.notes if "does not read" in note]
    with pytest.raises(TunekitError, match="'category' and 'intent' could both be the label"):
        labels_format.make_example({"text": "a", "category": "x", "intent": "y"})
    assert labels_format.make_example({"text": "a", "category": "x", "label": "y"}).label == "y"


@pytest.mark.drawn
def test_a_merged_decoder_classifier_states_its_problem_and_its_padding(llama: Path, tmp_path: Path) -> None:
    assert AutoTokenizer.from_pretrained(llama).pad_token is None
    run = train(write_recipe(tmp_path, llama, training={"epochs": 3}))
    merge_verb(str(run / "adapter"), str(tmp_path / "merged"), str(llama), None, [])
    config = json.loads((tmp_path / "merged" / "config.json").read_text("utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert config["problem_type"] == "single_label_classification"
    assert tokenizer.pad_token_id == config["pad_token_id"]
    texts = ["good so so so", "bad"]
    pipeline = transformers.pipeline("text-classification", model=str(tmp_path / "merged"), device="cpu")
    together, alone = pipeline(texts, batch_size=2), [pipeline(text)[0] for text in texts]
    assert [each["label"] for each in together] == [each["label"] for each in alone]
    assert [each["score"] for each in together] == pytest.approx([each["score"] for each in alone], abs=1e-5)
