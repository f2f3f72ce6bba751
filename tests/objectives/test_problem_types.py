"""Heads of several labels a row and of numbers, from recipe to merged model, against transformers and peft."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import pyarrow.parquet
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.objectives.test_classify import CPU, losses_of, start_as_ours
from tests.objectives.test_classify import base as base
from tests.objectives.test_classify import bert as bert
from tests.objectives.test_classify import llama as llama
from tests.objectives.test_classify import write_recipe as write_labelled
from tests.support.plans import make_plan
from tests.support.speech_case import write_tiny_whisper
from tests.support.tiny_vit import write_tiny_vit
from tests.support.train_case import lose_the_end, losses, tensors_of, train
from tunekit.adapter import combine_verb
from tunekit.data.looking.first_look import look_at
from tunekit.data.looking.first_recipe import FirstRecipe, recipe_text
from tunekit.errors import DataError, TunekitError
from tunekit.evaluate import evaluate_verb
from tunekit.generate import answer
from tunekit.merge import merge_verb
from tunekit.metrics import mse, pearson, spearman
from tunekit.metrics.outputs import ROW_VALUES, output_table
from tunekit.objectives.losses.confusion import label_sums
from tunekit.objectives.losses.multi_label import MultiLabelLoss, best_threshold
from tunekit.planning.checks import raise_refusals
from tunekit.recipe.load import load_recipe
from tunekit.targets.target import find_target, load_target

STEPS = 10
WORDS = {"good": 1.0, "bad": -1.0, "odd": 0.25}
MULTI, NUMBERS = "multi_label_classification", "regression"
KINDS = {"multi": MULTI, "one": NUMBERS, "three": NUMBERS}


def rows_of(kind: str, count: int) -> list[tuple[str, Any]]:
    """Texts of one word or two: the words are the labels, their values the numbers."""
    names, found = list(WORDS), list[tuple[str, Any]]()
    for number in range(count):
        some = [name for place, name in enumerate(names) if (number % 7 + 1) >> place & 1]
        text = " ".join(some or ["so"]) + " so" * (number % 4)
        total = sum(WORDS[name] for name in some)
        label = {"multi": some, "one": total, "three": [total, float(len(some)), 0.5 - total]}[kind]
        found.append((text, label))
    return found


def write_recipe(folder: Path, base: Path, kind: str, **sections: Any) -> Path:
    objective = {"method": "classify", "problem_type": KINDS[kind], **sections.pop("objective", {})}
    recipe = write_labelled(folder, base, objective=objective, **sections)
    for name, count in (("train", 42), ("test", 14)):
        lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in rows_of(kind, count)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return recipe


def target_of(kind: str, label: Any) -> list[float]:
    if kind == "multi":
        return [float(name in label) for name in sorted(WORDS)]
    return label if isinstance(label, list) else [label]


def result_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))  # type: ignore[no-any-return]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_ten_steps_equal_transformers_and_peft(kind: str, method: str, base: Path, tmp_path: Path) -> None:
    once = {"learning_rate": 2e-3, "epochs": None, "max_steps": STEPS}
    adapter = {"method": method, "r": 4} if method == "lora" else {}
    recipe = write_recipe(tmp_path, base, kind, data={"shuffle": False}, adapter=adapter, training=once)
    if method == "full":
        values = json.loads(recipe.read_text("utf-8")) | {"adapter": {"method": "full"}}
        recipe.write_text(json.dumps(values), encoding="utf-8")
    plan, prepared = make_plan(load_recipe(recipe), device=CPU)
    rows = rows_of(kind, 42)
    outputs = len(target_of(kind, rows[0][1]))
    theirs: Any = AutoModelForSequenceClassification.from_pretrained(
        base,
        num_labels=outputs,
        problem_type=KINDS[kind],
        dtype=torch.float32,
        pad_token_id=prepared.processor.tokenizer.pad_id,
    )
    if method == "lora":
        config = peft.LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")
        theirs = peft.get_peft_model(theirs, config)
        start_as_ours(theirs, recipe, tmp_path)
    else:
        train(recipe, f"output.dir={tmp_path / 'start'}", "training.max_steps=1")
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "start" / "model").eval()
        assert theirs.config.problem_type == KINDS[kind]
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(prepared.processor.tokenizer.pad_id)
    tokenizer.padding_side = "right"

    def loss_of(step: int) -> torch.Tensor:
        batch = rows[step % 7 * 6 : step % 7 * 6 + 6]
        inputs = tokenizer([text for text, _ in batch], return_tensors="pt", padding=True)
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        values = torch.tensor([target_of(kind, label) for _, label in batch])
        loss: torch.Tensor = theirs(**inputs, labels=values).loss
        return loss

    expected = losses_of(theirs, recipe, plan.warmup_steps, STEPS, loss_of)
    assert losses(train(recipe)) == pytest.approx(expected, rel=1e-5, abs=2e-6)
    small = ["training.micro_batch_size=2", "training.gradient_accumulation_steps=3"]
    train(recipe, *small, f"output.dir={tmp_path / 'few'}")
    assert losses(tmp_path / "few") == pytest.approx(expected, rel=1e-5, abs=2e-6), "accumulated, the loss is the same"


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_and_its_folder_is_used_by_every_verb(kind: str, base: Path, tmp_path: Path) -> None:
    metrics = {"multi": ["loss", "micro_f1", "macro_f1", "accuracy"], "one": ["mse", "pearson", "spearman"]}
    measured = {"metrics": metrics.get(kind, metrics["one"])}
    training = {"epochs": 30} if kind == "multi" else {"epochs": 40, "learning_rate": 3e-3}
    recipe = write_recipe(tmp_path, base, kind, training=training, evaluation=measured)
    run = train(recipe)
    test = str(tmp_path / "test.jsonl")
    evaluate_verb(str(run), None, test, "labels", ["loss", *measured["metrics"]], str(tmp_path / "after.json"), [])
    after = result_of(tmp_path / "after.json")
    assert after["rows"] == 14
    found = result_of(run / "report.json")
    assert after["loss"] < 0.5 * found["base_eval_loss"]
    if kind == "multi":
        assert after["micro_f1"] > 0.8
        assert 0 < after["accuracy"] <= 1
    else:
        assert after["mse"] == pytest.approx(after["loss"], rel=1e-6)
        assert min(after["pearson"], after["spearman"]) > 0.5
    texts = [text for text, _ in rows_of(kind, 7)]
    answers = [json.loads(each) for each in answer(load_target(find_target(str(run), None, []), CPU), texts)]
    outputs = len(target_of(kind, rows_of(kind, 1)[0][1]))
    report = result_of(run / "report.json")["classes"]["per_class"]
    assert len(report) == outputs
    assert ("| label | mse | pearson | spearman | rows |" in (run / "report.md").read_text("utf-8")) == (
        kind != "multi"
    )
    alone = tmp_path / "alone"
    (run / "adapter").rename(alone)
    evaluate_verb(str(alone), str(base), test, "labels", [], str(tmp_path / "alone.json"), [])
    assert result_of(tmp_path / "alone.json")["loss"] == pytest.approx(after["loss"], rel=1e-6)
    merge_verb(str(alone), str(tmp_path / "merged"), str(base), None, [])
    config = result_of(tmp_path / "merged" / "config.json")
    assert config["problem_type"] == KINDS[kind]
    assert len(config["id2label"]) == outputs
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    total = 0.0
    for place, (text, label) in enumerate(rows_of(kind, 14)):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            output = merged(input_ids=ids, labels=torch.tensor([target_of(kind, label)]))
        total += float(output.loss)
        if place < 7 and kind == "multi":
            named = [
                merged.config.id2label[number] for number in output.logits[0].sigmoid().ge(0.5).nonzero()[:, 0].tolist()
            ]
            assert answers[place] == named
        elif place < 7:
            assert output.logits[0].tolist() == pytest.approx(
                answers[place] if outputs > 1 else [answers[place]], abs=1e-4
            )
    assert total / 14 == pytest.approx(after["loss"], rel=1e-4, abs=1e-6), "transformers' own loss by problem_type"
    wide = ["model.dtype=float32"]
    evaluate_verb(str(tmp_path / "merged"), None, test, "labels", [], str(tmp_path / "merged.json"), wide)
    assert result_of(tmp_path / "merged.json")["loss"] == pytest.approx(after["loss"], rel=1e-4, abs=1e-6)
    assert result_of(tmp_path / "merged" / "merge_report.json")["largest_logit_difference"] < 1e-4


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_streams_and_batches_exactly(kind: str, llama: Path, tmp_path: Path) -> None:
    training = {"epochs": None, "max_steps": 6, "save_steps": 3, "learning_rate": 2e-3}
    plain = train(write_recipe(tmp_path / "plain", llama, kind, training=training))
    streamed = write_recipe(tmp_path / "streamed", llama, kind, training=training, memory={"streaming": "disk"})
    assert tensors_of(train(streamed)) == tensors_of(plain)
    expected, records = tensors_of(plain), (plain / "metrics.jsonl").read_text("utf-8").splitlines()
    lose_the_end(plain)
    train(tmp_path / "plain" / "recipe.yaml", resume=True)
    assert tensors_of(plain) == expected
    again = [json.loads(line) for line in (plain / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [each.get("eval") for each in again] == [json.loads(line).get("eval") for line in records]
    one = write_recipe(tmp_path / "one", llama, kind, training=training, evaluation={"batch_size": 1})
    last = [json.loads(line) for line in (train(one) / "metrics.jsonl").read_text("utf-8").splitlines()][-1]["eval"]
    assert last == pytest.approx(again[-1]["eval"], rel=1e-5), "an evaluation does not depend on its batches"


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("kind", ["multi", "one"])
def test_eval_of_the_untuned_base_equals_step_0_of_the_run(
    kind: str, listed: bool, llama: Path, bert: Path, tmp_path: Path
) -> None:
    names = {"multi": sorted(WORDS), "one": ["LABEL_0"]}[kind]
    objective = {"labels": names} if listed else {}
    training = {"epochs": None, "max_steps": 1, "seed": 5}
    base = bert if listed else llama
    recipe = write_recipe(tmp_path, base, kind, objective=objective, training=training)
    evaluate_verb(str(recipe), None, None, None, [], str(tmp_path / "before.json"), [])
    first = result_of(train(recipe) / "report.json")["evaluations"][0]
    assert first["step"] == 0
    before = result_of(tmp_path / "before.json")
    assert {name: before[name] for name in first["eval"]} == pytest.approx(first["eval"], rel=1e-6)


def as_text(kind: str, label: Any) -> str:
    return json.dumps(label) if kind != "one" else str(label)


@pytest.mark.parametrize("kind", KINDS)
def test_a_csv_file_has_the_same_rows(kind: str, llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, llama, kind)
    with (tmp_path / "train.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("text", "label"), *((text, as_text(kind, label)) for text, label in rows_of(kind, 42))])
    parts = []
    for name in ("train.jsonl", "train.csv"):
        _, prepared = make_plan(load_recipe(recipe, [f"data.train={tmp_path / name}"]), device=CPU)
        parts.append([prepared.rows.train[number].parts["label"].tobytes() for number in range(42)])
    assert parts[0] == parts[1]


@pytest.mark.parametrize("older", [False, True])
def test_classes_of_parquet_are_names_and_none_is_a_row(older: bool, llama: Path, tmp_path: Path) -> None:
    rows = {"text": ["a b", "c", "d"], "label": [[1, 0], [], [2]]}
    classes = datasets.Sequence(datasets.ClassLabel(names=["low", "mid", "high"]))
    features = datasets.Features({"text": datasets.Value("string"), "label": classes})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    if older:  # [ClassLabel(...)], as datasets wrote it before version 4
        table = pyarrow.parquet.read_table(tmp_path / "train.parquet")
        stated = json.loads(table.schema.metadata[b"huggingface"])
        stated["info"]["features"]["label"] = [stated["info"]["features"]["label"]["feature"]]
        table = table.replace_schema_metadata({"huggingface": json.dumps(stated)})
        pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    recipe = write_recipe(tmp_path, llama, "multi", data={"train": "train.parquet", "eval": None})
    _, prepared = make_plan(load_recipe(recipe), device=CPU)
    objective, train = prepared.rows.objective, prepared.rows.train
    assert objective.facts["labels"] == ["high", "low", "mid"]
    assert [objective.rows.labels_of(train[number]) for number in range(3)] == [["mid", "low"], [], ["high"]]
    batch = objective.rows.collate([[train[number]] for number in range(3)])
    assert batch.targets["labels"].tolist() == [[0, 1, 1], [0, 0, 0], [1, 0, 0]]


SECOND = "train.jsonl:2: "


@pytest.mark.parametrize(
    ("problem_type", "labels", "message"),
    [
        (None, ["a", ["b"]], SECOND + "the label is a list.*objective.problem_type: multi_label_classification"),
        (
            None,
            ["a", '["b", "c"]'],
            SECOND + "the label is a list.*objective.problem_type: multi_label_classification",
        ),
        (None, ["a", 0.5], SECOND + "the label is a fractional number.*objective.problem_type: regression"),
        (None, ["a", [0.5, 1]], SECOND + "the label is a list.*objective.problem_type: regression"),
        (None, ["1", "2.5"], SECOND + "the label 2.5 is a number with a fraction.*objective.problem_type: regression"),
        (MULTI, [["a"], "b"], SECOND + r"the label 'b' is not a list of names; write a list of label names"),
        (MULTI, [["a"], [0.5]], SECOND + r"the label \[0.5\] is not a list of names"),
        (MULTI, [["a"], [0, 1, 0]], SECOND + "the row has the label '0' twice.*multi-hot"),
        (MULTI, [[0, 1], [1, 0]], r"train.jsonl:1: each training row has all labels \(0, 1\).*multi-hot"),
        (MULTI, [["a"], ["a", None]], SECOND + "'label' must be a text or a number, or a list of them, not null"),
        (MULTI, [["a"], [["a"]]], SECOND + "'label' must be a text or a number, or a list of them, not list"),
        (MULTI, [["a"], "[a"], SECOND + r"the label '\[a' begins with '\[' but is not a list; write a JSON list"),
        (None, ["a", "b\ud800"], SECOND + "'label' contains the lone surrogate"),
        (MULTI, [["a"], ["b\ud800"]], SECOND + "'label' contains the lone surrogate"),
        (MULTI, [["a"], ["1"], ["1.0"]], "train.jsonl:3: the label '1.0' is the same number as the label '1'"),
        (MULTI, [[], []], "no row of data.train has a label"),
        (NUMBERS, [1, "much"], SECOND + "the label 'much' is not a number"),
        (NUMBERS, [1, "nan"], SECOND + "the label nan is infinite, NaN or too large"),
        (NUMBERS, [1, 1e200], SECOND + "the label 1e.200 is infinite, NaN or too large"),
        (NUMBERS, [1, 1e20], SECOND + "the label 1e.20 is infinite, NaN or too large to be learned"),
        (NUMBERS, [1, True], SECOND + "the label 'true' is not a number"),
        (NUMBERS, [1, None], SECOND + "'label' must be a text or a number, or a list of them, not null"),
        (NUMBERS, [[1, 2], [1]], SECOND + r"the row has 1 number, but the first row \(.*train.jsonl:1\) has 2"),
        (NUMBERS, [[1], []], SECOND + "the label is an empty list"),
    ],
)
def test_wrong_labels_are_named_with_their_line(
    problem_type: str | None, labels: list[Any], message: str, llama: Path, tmp_path: Path
) -> None:
    objective = {"method": "classify"} | ({"problem_type": problem_type} if problem_type else {})
    recipe = write_labelled(tmp_path, llama, objective=objective, data={"eval": None})
    lines = [json.dumps({"text": "a text", "label": label}) + "\n" for label in labels]
    (tmp_path / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    with pytest.raises(TunekitError, match=message):
        make_plan(load_recipe(recipe), device=CPU)


def test_nan_in_a_parquet_file_is_named_with_its_row(llama: Path, tmp_path: Path) -> None:
    rows = {"text": ["a", "b", "c"], "label": [0.5, float("nan"), float("inf")]}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "train.parquet"))
    recipe = write_recipe(tmp_path, llama, "one", data={"train": "train.parquet", "eval": None})
    with pytest.raises(TunekitError, match=r"train.parquet:2: the label nan is infinite, NaN or too large") as caught:
        make_plan(load_recipe(recipe), device=CPU)
    assert "train.parquet:3: the label inf" in str(caught.value)


def test_labels_of_the_evaluation_rows_must_be_known(llama: Path, tmp_path: Path) -> None:
    for kind, label, message in (
        ("multi", ["good", "new"], "test.jsonl:15: the label 'new' is in no row of data.train"),
        ("three", [1.0, 2.0], "test.jsonl:15: the row has 2 numbers, but the first row"),
    ):
        recipe = write_recipe(tmp_path / kind, llama, kind)
        with (tmp_path / kind / "test.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"text": "late", "label": label}) + "\n")
        with pytest.raises(TunekitError, match=message):
            make_plan(load_recipe(recipe), device=CPU)


@pytest.mark.drawn
def test_a_share_for_evaluation_may_take_the_only_row_of_a_label(llama: Path, tmp_path: Path) -> None:
    recipe = write_labelled(tmp_path, llama, data={"eval": 0.5})

    def notes(labels: list[str]) -> str:
        lines = [json.dumps({"text": f"text {index}", "label": label}) + "\n" for index, label in enumerate(labels)]
        (tmp_path / "train.jsonl").write_text("".join(lines), encoding="utf-8")
        return "\n".join(make_plan(load_recipe(recipe), device=CPU)[0].notes)

    once = "abcdefghijklmnop"
    held = [label for label in once if f"the label '{label}' occurs only in the evaluation rows" in notes([*once])]
    assert len(held) == 8  # each of them is a label of the head, which no training row has

    def refusal(place: int) -> str:
        try:
            return notes(["rare" if index == place else "same" for index in range(len(once))])
        except DataError as error:
            return str(error)

    refusals = [refusal(place) for place in range(len(once))]  # the share follows a row's text and label
    alone = [refusal for refusal in refusals if "all training rows have the label 'same'" in refusal]
    assert 0 < len(alone) < len(once)


@pytest.mark.drawn
def test_ten_thousand_labels_are_refused_or_learned(llama: Path, tmp_path: Path) -> None:
    recipe = write_labelled(tmp_path, llama, data={"eval": None})

    def write(labels: list[str]) -> None:
        lines = [json.dumps({"text": f"text {label}", "label": label}) + "\n" for label in labels]
        (tmp_path / "train.jsonl").write_text("".join(lines), encoding="utf-8")

    write([f"name {number}" for number in range(10_000)])
    with pytest.raises(TunekitError, match=r"train.jsonl:1: each of the 10,000 labels occurs in only one row"):
        make_plan(load_recipe(recipe), device=CPU)
    write([f"name {number}" for number in range(2_000)] + ["name 0"])
    plan, prepared = make_plan(load_recipe(recipe), device=CPU)
    assert any(note.startswith("1,999 labels have only one training row each (name 1, ") for note in plan.notes)
    loss: Any = prepared.rows.objective.loss
    sums = label_sums(torch.zeros(2, 2_000), torch.tensor([0, 1999]))
    assert "confusion" not in sums, "it grows with the square of the labels"
    assert len(loss.class_counts({name: value.tolist() for name, value in sums.items()})["counts"]) == 2_000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"problem_type": MULTI, "class_weights": "balanced"},
            "class_weights: needs problem_type: single_label_classification",
        ),
        (
            {"problem_type": NUMBERS, "label_smoothing": 0.1},
            "label_smoothing: needs problem_type: single_label_classification",
        ),
        (
            {"problem_type": NUMBERS, "fit_thresholds": True},
            "fit_thresholds: needs problem_type: multi_label_classification",
        ),
        ({"fit_thresholds": True}, "fit_thresholds: needs problem_type: multi_label_classification"),
        ({"problem_type": "several"}, "objective.problem_type"),
    ],
)
def test_settings_of_other_kinds_are_refused(
    settings: dict[str, Any], message: str, llama: Path, tmp_path: Path
) -> None:
    recipe = write_labelled(tmp_path, llama, objective={"method": "classify", **settings})
    with pytest.raises(TunekitError, match=message):
        load_recipe(recipe)


def test_metrics_belong_to_their_kind(llama: Path, tmp_path: Path) -> None:
    for kind, metric in (("multi", "spearman"), ("one", "macro_f1"), ("one", "accuracy")):
        recipe = write_recipe(tmp_path, llama, kind, evaluation={"metrics": [metric]})
        with pytest.raises(TunekitError, match=f"objective classify has no metric {metric}; its metrics are "):
            load_recipe(recipe)
    recipe = write_recipe(tmp_path, llama, "multi", data={"eval": None}, objective={"fit_thresholds": True})
    with pytest.raises(TunekitError, match=r"objective.fit_thresholds: needs evaluation rows; set data.eval"):
        load_recipe(recipe)


def test_correlations_are_those_of_numpy_and_ties_share_their_rank() -> None:
    generator = np.random.default_rng(0)
    values = generator.integers(0, 5, (40, 2)).astype(float)
    scores = values + generator.normal(0, 2, (40, 2)).round(0) + 2000.0
    sums = {ROW_VALUES: np.concatenate([scores, values], axis=1).tolist()}

    def ranks(column: Any) -> Any:
        return np.array([(column < each).sum() + (column == each).sum() / 2 + 0.5 for each in column])

    columns = list(zip(scores.T, values.T, strict=True))
    expected = [np.corrcoef(*pair)[0, 1] for pair in columns]
    of_ranks = [np.corrcoef(ranks(one), ranks(other))[0, 1] for one, other in columns]
    assert mse.from_sums(sums) == pytest.approx(((scores - values) ** 2).mean(), rel=1e-12)
    assert pearson.from_sums(sums) == pytest.approx(np.mean(expected), rel=1e-12)
    assert spearman.from_sums(sums) == pytest.approx(np.mean(of_ranks), rel=1e-12)
    turned = {ROW_VALUES: sums[ROW_VALUES][::-1]}
    for metric in (mse, pearson, spearman):
        assert metric.from_sums(turned) == metric.from_sums(sums), "the order of rows does not matter"
    for metric in (pearson, spearman):
        assert metric.from_sums({ROW_VALUES: [[1.0, 3.0], [2.0, 5.0], [3.0, 7.0]]}) == 1.0
    lines = output_table(["a", "b"], [[1.0, 2.0, 3.0, 4.0], [1.0, 5.0, 3.0, 5.0]])
    assert (lines[0]["pearson"], lines[0]["mse"]) == (None, 4.0), "nothing correlates with a constant"
    assert math.isnan(pearson.from_sums({ROW_VALUES: [[1.0, 3.0], [1.0, 4.0]]}))


def test_a_threshold_is_the_one_of_best_f1() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        probabilities = torch.rand(12, generator=generator, dtype=torch.float64).mul(5).round() / 5 * 0.9 + 0.03
        true = (torch.rand(12, generator=generator) < 0.4).double()

        def score(threshold: float, probabilities: Any = probabilities, true: Any = true) -> float:
            predicted = (probabilities >= threshold).double()
            return float(2 * (predicted * true).sum() / (predicted.sum() + true.sum()).clamp(min=1))

        found = best_threshold(probabilities, true)
        assert score(found) == pytest.approx(max(score(each / 200) for each in range(1, 200)))
        assert score(found) > score(0.5) or found == 0.5
    assert best_threshold(torch.tensor([0.9, 0.1]), torch.zeros(2)) == 0.5


def test_a_threshold_tells_probabilities_near_one_apart() -> None:
    scores, true = torch.tensor([[12.0], [12.002]]), torch.tensor([0.0, 1.0])
    threshold = best_threshold(torch.sigmoid(scores[:, 0].double()), true)
    loss = MultiLabelLoss(labels=("a",), thresholds=(threshold,))
    assert loss.predicted(scores).tolist() == [[False], [True]]


@pytest.mark.drawn
def test_fitted_thresholds_go_with_the_result(bert: Path, tmp_path: Path) -> None:
    fitted = {"fit_thresholds": True}
    training = {"epochs": None, "max_steps": 6, "save_steps": 3, "eval_steps": 3, "learning_rate": 2e-3}
    best = {"metrics": ["loss", "micro_f1", "macro_f1", "accuracy"], "best": "eval.loss"}
    recipe = write_recipe(tmp_path, bert, "multi", objective=fitted, training=training, evaluation=best)
    run = train(recipe)
    found = result_of(run / "report.json")
    thresholds = result_of(run / "adapter" / "tunekit.json")["objective"]["thresholds"]
    assert [line["threshold"] for line in found["classes"]["per_class"]] == thresholds
    assert thresholds != [0.5] * 3
    assert any("chosen on these evaluation rows" in note for note in result_of(run / "plan.json")["notes"])
    expected = found["evaluations"][-1]["eval"]
    # Fixed from here on: fewer rows do not change them.
    half = tmp_path / "half.jsonl"
    half.write_text("".join((tmp_path / "test.jsonl").read_text("utf-8").splitlines(keepends=True)[:5]), "utf-8")
    for name, target in (("run", run), ("adapter", run / "adapter"), ("last", f"{run}@last")):
        evaluate_verb(str(target), None, None, None, ["accuracy"], str(tmp_path / f"{name}.json"), [])
        values = result_of(tmp_path / f"{name}.json")
        assert {key: values[key] for key in expected} == pytest.approx(expected, rel=1e-6)
        evaluate_verb(str(target), None, str(half), "labels", [], str(tmp_path / f"{name}.json"), [])
        assert result_of(tmp_path / f"{name}.json")["classes"]["thresholds"] == thresholds
    merge_verb(str(run), str(tmp_path / "merged"), None, None, [])
    assert result_of(tmp_path / "merged" / "config.json")["thresholds"] == thresholds
    evaluate_verb(str(tmp_path / "merged"), None, str(half), "labels", [], str(tmp_path / "merged.json"), [])
    assert result_of(tmp_path / "merged.json")["classes"]["thresholds"] == thresholds
    # A run that starts from the merged model and fits none answers from 0.5 on, and so does its result.
    again = train(write_recipe(tmp_path / "again", tmp_path / "merged", "multi", training=training))
    merge_verb(str(again), str(tmp_path / "twice"), None, None, [])
    assert "thresholds" not in result_of(tmp_path / "twice" / "config.json")
    # Combined adapters have other scores, so that no thresholds fit them; and scores of one meaning go together.
    folder, other = run / "adapter", Path(shutil.copytree(run / "adapter", tmp_path / "other"))
    combine_verb([str(folder), str(other)], None, "linear", None, None, None, None, None, str(tmp_path / "combined"))
    labels = {"labels": sorted(WORDS)}
    assert result_of(tmp_path / "combined" / "tunekit.json")["objective"] == {
        "method": "classify",
        "problem_type": MULTI,
        **labels,
    }
    facts = result_of(other / "tunekit.json") | {"objective": {"method": "classify", **labels}}
    (other / "tunekit.json").write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(TunekitError, match=r"single_label_classification, but .* for multi_label_classification"):
        combine_verb([str(folder), str(other)], None, "linear", None, None, None, None, None, str(tmp_path / "no"))
    before = tensors_of(run), result_of(run / "adapter" / "tunekit.json")
    (run / "status.json").unlink()
    (run / "adapter").rename(tmp_path / "taken")
    train(recipe, resume=True)
    assert (tensors_of(run), result_of(run / "adapter" / "tunekit.json")) == before


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_peft_are_read(kind: str, base: Path, tmp_path: Path) -> None:
    """Their folders do not say what the scores mean: the user does."""
    labels = len(target_of(kind, rows_of(kind, 1)[0][1]))
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=labels, problem_type=KINDS[kind], dtype=torch.float32
    )
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False)
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    rows = rows_of(kind, 14)
    write_recipe(tmp_path, base, kind)
    stated = ["model.dtype=float32", f"objective.problem_type={KINDS[kind]}"]
    if kind == "multi":
        stated.append("objective.labels=[bad, good, odd]")
    tokenizer, total = AutoTokenizer.from_pretrained(base), 0.0
    for text, label in rows:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            total += float(theirs(input_ids=ids, labels=torch.tensor([target_of(kind, label)])).loss)
    test = str(tmp_path / "test.jsonl")
    evaluate_verb(str(tmp_path / "theirs"), str(base), test, "labels", [], str(tmp_path / "found.json"), stated)
    assert result_of(tmp_path / "found.json")["loss"] == pytest.approx(total / 14, rel=1e-5)


def test_a_recipe_cannot_continue_a_head_of_another_kind(llama: Path, tmp_path: Path) -> None:
    once = {"epochs": None, "max_steps": 1}
    folder = train(write_recipe(tmp_path, llama, "three", training=once)) / "adapter"
    recipe = write_labelled(tmp_path / "other", llama, adapter={"init_from": str(folder)})
    with pytest.raises(TunekitError, match=r"objective.problem_type: is single_label_classification, but .*regression"):
        raise_refusals(make_plan(load_recipe(recipe), device=CPU)[0])
    again = write_recipe(tmp_path / "same", llama, "three", training=once, adapter={"init_from": str(folder)})
    _, prepared = make_plan(load_recipe(again), device=CPU)
    assert prepared.rows.objective.facts == {"problem_type": NUMBERS, "labels": ["LABEL_0", "LABEL_1", "LABEL_2"]}


@pytest.mark.drawn
@pytest.mark.parametrize("medium", ["image", "audio"])
def test_images_and_recordings_take_the_same_key(medium: str, tmp_path: Path) -> None:
    """Several labels of images, numbers of recordings."""
    lines = []
    for number in range(12):
        file = tmp_path / f"{number}.{'png' if medium == 'image' else 'wav'}"
        if medium == "image":
            Image.fromarray(np.full((24, 24, 3), 20 * number, np.uint8)).save(file)
        else:
            soundfile.write(file, np.sin(np.arange(3200) * (number + 1) / 40) / 2, 16000)
        names = [name for name, there in (("dark", number < 6), ("even", number % 2 == 0)) if there]
        lines.append({medium: file.name, "label": names if medium == "image" else number / 8})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    base = write_tiny_vit(tmp_path / "base") if medium == "image" else write_tiny_whisper(tmp_path / "base")
    values: dict[str, Any] = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "data": {"train": "rows.jsonl", "eval": "rows.jsonl"},
        "adapter": {"method": "lora", "r": 4},
        "objective": {"method": f"{medium}_classify", "problem_type": MULTI if medium == "image" else NUMBERS},
        "training": {"learning_rate": 1e-3, "epochs": 2, "micro_batch_size": 4, "gradient_accumulation_steps": 1},
        "output": {"dir": "run"},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(values), encoding="utf-8")
    run = train(recipe)
    found = result_of(run / "report.json")
    loaded = load_target(find_target(str(run), None, []), CPU)
    rows, objective = loaded.objective.rows, loaded.objective
    total = 0.0
    for line in lines:
        batch = rows.collate([rows.unlabelled(loaded.model, [rows.question(str(tmp_path / line[medium]))])])
        with torch.no_grad():
            scores = objective.loss.scores(loaded.model.output(batch.inputs), batch)[0]  # type: ignore[attr-defined]
        if medium == "image":
            wanted = torch.tensor([[float(name in line["label"]) for name in ("dark", "even")]])
            total += float(torch.nn.functional.binary_cross_entropy_with_logits(scores, wanted))
        else:
            total += float((scores - line["label"]).square().mean())
    assert found["evaluations"][-1]["eval"]["loss"] == pytest.approx(total / 12, rel=1e-4)
    merge_verb(str(run), str(tmp_path / "merged"), None, None, [])
    assert result_of(tmp_path / "merged" / "config.json")["problem_type"] == values["objective"]["problem_type"]


def test_pairs_have_numbers_too_and_minus_one_is_one(llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, llama, "one", data={"eval": None})
    rows = [{"sentence1": "a b", "sentence2": "c", "label": label} for label in (-1, 0.5, 4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    _, prepared = make_plan(load_recipe(recipe), device=CPU)
    kind, train_rows = prepared.rows.objective.rows, prepared.rows.train
    assert kind.collate([[train_rows[number]] for number in range(3)]).targets["labels"].tolist() == [[-1], [0.5], [4]]


@pytest.mark.parametrize(
    ("label", "written", "metrics"),
    [
        (["a", "b"], "problem_type: multi_label_classification", "[loss, accuracy, macro_f1]"),
        (0.5, "problem_type: regression", "[loss, pearson, spearman]"),
        ([0.5, 1], "problem_type: regression", "[loss, pearson, spearman]"),
        ("a", "objective: classify", "[loss, accuracy, macro_f1]"),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_init_writes_the_problem_type(
    name: str, label: Any, written: str, metrics: str, llama: Path, tmp_path: Path
) -> None:
    lines = [json.dumps({"text": f"text {number}", "label": label}) + "\n" for number in range(10)]
    if name == "rows.csv":
        cell = (label if isinstance(label, str) else json.dumps(label)).replace('"', '""')
        lines = ["text,label\n", *(f'text {number},"{cell}"\n' for number in range(10))]
    (tmp_path / name).write_text("".join(lines), encoding="utf-8")
    first = FirstRecipe(str(tmp_path / name), str(llama), "lora", "none", 0.2, look_at(str(tmp_path / name)))
    (tmp_path / "recipe.yaml").write_text(text := recipe_text(first, tmp_path / "recipe.yaml"), encoding="utf-8")
    assert written in text
    assert f"metrics: {metrics}" in text
    load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_head_starts_at_the_labels_frequencies_or_the_mean_number(kind: str, bert: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, bert, kind)
    train(recipe, "training.learning_rate=0", "training.max_steps=1", "training.epochs=null")
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    (bias,) = (tensor for name, tensor in tensors.items() if name.endswith("classifier.bias"))
    values = torch.tensor([target_of(kind, label) for _, label in rows_of(kind, 42)]).double()
    count = values.sum(dim=0)
    expected = torch.log((count + 0.5) / (42 - count + 0.5)) if kind == "multi" else values.mean(dim=0)
    assert bias.double().tolist() == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.drawn
@pytest.mark.parametrize("method", ["lora", "full"])
def test_numbers_near_2000_are_learned_in_bfloat16(method: str, bert: Path, tmp_path: Path) -> None:
    """In training, and from the files of a merged or fully trained model of bfloat16."""
    model = {"name_or_path": str(bert), "dtype": "bfloat16"}
    recipe = write_recipe(tmp_path, bert, "one", model=model, training={"learning_rate": 5e-3, "epochs": 20})
    if method == "full":
        values = json.loads(recipe.read_text("utf-8")) | {"adapter": {"method": "full"}}
        recipe.write_text(json.dumps(values), encoding="utf-8")
    for name, count in (("train", 42), ("test", 14)):
        rows = [json.dumps({"text": text, "label": 2000.5 + 2 * label}) for text, label in rows_of("one", count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    run = train(recipe)
    report = result_of(run / "report.json")
    assert report["eval_loss"] < 0.5 * report["base_eval_loss"]
    texts = [text for text, _ in rows_of("one", 7)]
    answers = [json.loads(each) for each in answer(load_target(find_target(str(run), None, []), CPU), texts)]
    folder = run / "model"
    if method == "lora":
        folder = tmp_path / "merged"
        merge_verb(str(run), str(folder), None, None, [], "bfloat16")
    merged = load_target(find_target(str(folder), None, ["model.dtype=bfloat16"]), CPU)
    assert [json.loads(each) for each in answer(merged, texts)] == pytest.approx(answers, abs=0.5)
