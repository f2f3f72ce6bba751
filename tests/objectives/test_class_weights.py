"""Weights of labels and label smoothing, against transformers and peft with torch's own cross entropy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.objectives.test_classify import CPU, losses_of, start_as_ours, texts, write_recipe
from tests.objectives.test_classify import base as base
from tests.objectives.test_classify import bert as bert
from tests.objectives.test_classify import llama as llama
from tests.support.plans import make_plan
from tests.support.train_case import lose_the_end, losses, tensors_of, train
from tunekit.errors import RecipeError, TunekitError
from tunekit.evaluate import evaluate_verb
from tunekit.recipe.load import load_recipe

STEPS = 10
LABELS = ["no", "perhaps", "yes"]


def rare(folder: Path) -> list[tuple[str, str]]:
    """Training rows of which one label is rare."""
    rows = [row for number, row in enumerate(texts(60)) if row[1] != "perhaps" or number % 4 == 0][:42]
    lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in rows]
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    return rows


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "settings",
    [{"class_weights": "balanced"}, {"class_weights": {"yes": 3}, "label_smoothing": 0.1}, {"label_smoothing": 0.2}],
)
def test_ten_steps_equal_transformers_and_peft(settings: dict[str, Any], base: Path, tmp_path: Path) -> None:
    objective, once = {"method": "classify", **settings}, {"learning_rate": 2e-3, "epochs": None, "max_steps": STEPS}
    recipe = write_recipe(tmp_path, base, data={"shuffle": False}, objective=objective, training=once)
    rows = rare(tmp_path)
    plan, prepared = make_plan(load_recipe(recipe), device=CPU)
    counts = [sum(label == name for _, label in rows) for name in LABELS]
    written = settings.get("class_weights")
    weight = None
    if written == "balanced":
        weight = torch.tensor([len(rows) / (3 * count) for count in counts])
    elif written is not None:
        weight = torch.tensor([1.0, 1.0, 3.0])
    assert any("weights of the labels in the training loss: no " in note for note in plan.notes) == (weight is not None)
    criterion = torch.nn.CrossEntropyLoss(weight, label_smoothing=settings.get("label_smoothing", 0.0))
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=3, dtype=torch.float32, pad_token_id=prepared.processor.tokenizer.pad_id
    )
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")
    theirs, tokenizer = peft.get_peft_model(model, config), AutoTokenizer.from_pretrained(base)
    start_as_ours(theirs, recipe, tmp_path)

    def loss_of(step: int) -> torch.Tensor:
        batch = rows[step % 7 * 6 : step % 7 * 6 + 6]
        ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text, _ in batch]
        logits = torch.cat([theirs(input_ids=each, attention_mask=torch.ones_like(each)).logits for each in ids])
        loss: torch.Tensor = criterion(logits, torch.tensor([LABELS.index(label) for _, label in batch]))
        return loss

    expected = losses_of(theirs, recipe, plan.warmup_steps, STEPS, loss_of)
    assert losses(train(recipe)) == pytest.approx(expected, rel=1e-5)
    changed = [
        "training.micro_batch_size=2",
        "training.gradient_accumulation_steps=3",
        f"output.dir={tmp_path / 'few'}",
    ]
    train(recipe, *changed)
    assert losses(tmp_path / "few") == pytest.approx(expected, rel=1e-5), "averaging per micro-batch would differ"


def test_the_accuracy_of_the_most_frequent_label_is_stated(llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    for name, rows in (("train", rare(tmp_path)), ("test", [("so", "yes"), ("so so", "no"), ("good", "no")])):
        lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    plan, _ = make_plan(load_recipe(recipe), device=CPU)
    assert "always answering 'yes', the most frequent label, has an eval.accuracy of 0.3333" in plan.notes


@pytest.mark.drawn
def test_evaluation_measures_without_weights_and_smoothing(llama: Path, tmp_path: Path) -> None:
    found = []
    for name, settings in (("plain", {}), ("weighted", {"class_weights": {"yes": 9}, "label_smoothing": 0.3})):
        once = {"epochs": None, "max_steps": 1}  # with a rate of 0
        objective = {"method": "classify", **settings}
        run = train(write_recipe(tmp_path / name, llama, objective=objective, training=once))
        assert set(json.loads((run / "evaluation_rows.json").read_text("utf-8"))["units"]) == {1.0}
        result = tmp_path / f"{name}.json"
        evaluate_verb(str(run), None, None, None, [], str(result), [])
        found.append(json.loads(result.read_text("utf-8")))
    assert found[0] == found[1]


@pytest.mark.drawn
def test_a_weighted_run_resumes_and_streams_exactly(llama: Path, tmp_path: Path) -> None:
    objective = {"method": "classify", "class_weights": {"yes": 3.0}, "label_smoothing": 0.1}
    training = {"epochs": None, "max_steps": 6, "save_steps": 3}
    plain = train(write_recipe(tmp_path / "plain", llama, objective=objective, training=training))
    streamed = write_recipe(
        tmp_path / "streamed", llama, objective=objective, training=training, memory={"streaming": "disk"}
    )
    assert tensors_of(train(streamed)) == tensors_of(plain)
    expected = tensors_of(plain)
    lose_the_end(plain)
    train(tmp_path / "plain" / "recipe.yaml", resume=True)
    assert tensors_of(plain) == expected


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"never": 2}, r"objective\.class_weights: 'never' is not among the labels \(no, perhaps, yes\)"),
        ({"yes": 0}, r"recipe\.yaml:1.*objective\.class_weights.yes: must be greater than 0, not 0$"),
        ({"yes": "x"}, r"recipe\.yaml:1.*objective\.class_weights.yes: must be a number, not 'x'$"),
        ("heavy", r"recipe\.yaml:1.*objective\.class_weights: must be balanced, or \{label: weight, \.\.\.\}"),
    ],
)
def test_wrong_weights_are_named(weights: Any, message: str, llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, llama, objective={"method": "classify", "class_weights": weights})
    with pytest.raises(TunekitError, match=message):
        make_plan(load_recipe(recipe), device=CPU)


def test_a_stream_cannot_be_balanced(llama: Path, tmp_path: Path) -> None:
    objective = {"method": "classify", "labels": LABELS, "class_weights": "balanced"}
    streamed = {"train": [{"path": "train.jsonl", "streaming": True}]}
    recipe = write_recipe(
        tmp_path, llama, data=streamed, objective=objective, training={"max_steps": 1, "epochs": None}
    )
    with pytest.raises(
        RecipeError, match=r"objective\.class_weights: .*cannot be counted before training; write the weights"
    ):
        make_plan(load_recipe(recipe), device=CPU)
