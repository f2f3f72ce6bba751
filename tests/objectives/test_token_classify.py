"""Token classification: tags over words from recipe to merged model, against transformers, peft and seqeval's rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from tests.conftest import write_tiny_llama
from tests.objectives.test_classify import base as base
from tests.objectives.test_classify import bert as bert
from tests.objectives.test_classify import losses_of, start_as_ours
from tests.support.plans import make_plan
from tests.support.train_case import check_a_resume, losses, train, write_sections
from tunekit.errors import TunekitError
from tunekit.evaluate import evaluate_verb
from tunekit.generate import answer
from tunekit.merge import merge_verb
from tunekit.metrics.span_f1 import find_spans, from_sums, kinds_of
from tunekit.model.load import load_model
from tunekit.planning.checks import raise_refusals
from tunekit.recipe.load import load_recipe
from tunekit.targets.target import find_target, load_target

CPU = torch.device("cpu")
TAGS = {"anna": "B-PER", "berg": "I-PER", "rome": "B-LOC", "is": "O", "in": "O"}
LABELS = ["B-LOC", "B-PER", "I-PER", "O"]
STEPS = 20


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder whose head drops nothing."""
    folder = write_tiny_llama(tmp_path_factory.mktemp("decoder"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "classifier_dropout": 0.0}), encoding="utf-8")
    return folder


def bases(quick: str, slow: str) -> pytest.MarkDecorator:
    """One base in the quick tier, the other in the slow one."""
    return pytest.mark.parametrize("base", [quick, pytest.param(slow, marks=pytest.mark.slow)], indirect=True)


def sentences(count: int) -> list[list[str]]:
    """Of different lengths, every word in several places."""
    kinds = (["anna", "berg", "is", "in", "rome"], ["rome", "is", "in"], ["is", "anna", "in", "rome"], ["berg", "is"])
    return [kinds[at % 4] + ["is"] * (at % 3) for at in range(count)]


def write_recipe(folder: Path, base: Path, **sections: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 24), ("test", 8)):
        rows = [{"words": words, "tags": [TAGS[word] for word in words]} for words in sentences(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values: dict[str, Any] = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "data": {"train": "train.jsonl", "eval": "test.jsonl", "max_length": 64, "shuffle": False},
        "objective": "token_classify",
        "adapter": {"method": "lora", "r": 4},
        "training": {"learning_rate": 0.01, "micro_batch_size": 6, "gradient_accumulation_steps": 1, "epochs": 3},
        "output": {"dir": "run"},
    }
    return write_sections(folder, values, sections)


def test_the_accuracy_of_the_most_frequent_tag_is_stated(llama: Path, tmp_path: Path) -> None:
    plan, _ = make_plan(load_recipe(write_recipe(tmp_path, llama)), device=CPU)
    tags = [TAGS[word] for words in sentences(8) for word in words]
    share = f"{tags.count('O') / len(tags):.4g}"
    assert f"always answering 'O', the most frequent label, has an eval.token_accuracy of {share}" in plan.notes


@pytest.mark.drawn
@bases("bert", "llama")
def test_a_run_learns_and_is_used_by_every_verb(base: Path, tmp_path: Path) -> None:
    run = train(write_recipe(tmp_path, base, training={"epochs": 20}))
    evaluate_verb(str(run), None, None, None, [], str(tmp_path / "after.json"), [])
    after = json.loads((tmp_path / "after.json").read_text("utf-8"))
    assert after["token_accuracy"] == after["span_f1"] == 1.0
    assert after["words"] == sum(map(len, sentences(8)))
    assert [line["label"] for line in after["classes"]["per_class"]] == ["LOC", "PER"]
    loaded = load_target(find_target(str(run), None, []), CPU)
    assert answer(loaded, ["anna berg is in rome", "berg is"]) == ["B-PER I-PER O O B-LOC", "I-PER O"]
    config = json.loads((run / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert config["task_type"] == "TOKEN_CLS"
    merge_verb(str(run / "adapter"), str(tmp_path / "merged"), None, None, [])
    merged = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged").eval()
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForTokenClassification.from_pretrained(base, num_labels=4), str(run / "adapter")
    ).eval()
    ids = torch.tensor([[5, 9, 11, 4, 8]])
    with torch.no_grad():
        family = loaded.model.base.family
        ours = family.scores(loaded.model.base.net, family.inputs_of(ids))
        torch.testing.assert_close(merged(input_ids=ids).logits[0], ours, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs(input_ids=ids).logits[0], ours, rtol=1e-4, atol=1e-5)
    assert list(merged.config.id2label.values()) == LABELS
    again = load_target(find_target(str(tmp_path / "merged"), None, []), CPU)
    assert answer(again, ["rome is"]) == ["B-LOC O"]


@pytest.mark.drawn
@bases("llama", "bert")
def test_twenty_steps_equal_transformers_and_peft(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base, training={"learning_rate": 2e-3, "epochs": None, "max_steps": STEPS})
    plan, _ = make_plan(load_recipe(recipe), device=CPU)
    ours = losses(train(recipe))
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForTokenClassification.from_pretrained(base, num_labels=4, dtype=torch.float32)
    heads = ["score", "classifier"]  # which PEFT's all-linear leaves out of sequence classifiers alone
    lora = peft.LoraConfig(
        r=4, lora_alpha=32, target_modules="all-linear", exclude_modules=heads, task_type="TOKEN_CLS"
    )
    theirs = peft.get_peft_model(model, lora)
    start_as_ours(theirs, recipe, tmp_path)
    rows = sentences(24)

    def loss_of(step: int) -> torch.Tensor:
        batch, total = rows[step % 4 * 6 : step % 4 * 6 + 6], torch.zeros(())
        for words in batch:
            text = " ".join(words)
            encoded = tokenizer(text, return_offsets_mapping=True)
            labels, begun = [], 0
            starts = {0, *(at + 1 for at, letter in enumerate(text) if letter == " ")}
            for start, _ in encoded["offset_mapping"]:  # a byte is a token here
                labels.append(LABELS.index(TAGS[words[begun]]) if start in starts else -100)
                begun += start in starts
            ids = torch.tensor([encoded["input_ids"]])
            total = total + theirs(input_ids=ids, labels=torch.tensor([labels])).loss * len(words)
        return total / sum(map(len, batch))

    assert ours == pytest.approx(losses_of(theirs, recipe, plan.warmup_steps, STEPS, loss_of), rel=1e-5)


@pytest.mark.drawn
@bases("llama", "bert")
def test_a_resumed_run_is_the_uninterrupted_one(base: Path, tmp_path: Path) -> None:
    training = {"epochs": 1, "save_steps": 2}
    check_a_resume(write_recipe(tmp_path, base, adapter={"dropout": 0.1}, training=training))


@pytest.mark.slow  # quickly, halves of a batch add up to it in tests/contract
@bases("llama", "bert")
def test_the_batch_size_is_a_memory_knob(base: Path, tmp_path: Path) -> None:
    short = {"learning_rate": 2e-3, "epochs": 1}
    one = train(write_recipe(tmp_path / "one", base, training=short))
    changed = {**short, "micro_batch_size": 2, "gradient_accumulation_steps": 3}
    other = train(write_recipe(tmp_path / "other", base, training=changed))
    assert losses(one) == pytest.approx(losses(other), rel=1e-5)


def test_numbers_are_names_that_the_recipe_lists_and_a_cut_keeps_the_first_words(bert: Path, tmp_path: Path) -> None:
    listed = {"method": "token_classify", "labels": LABELS}
    recipe = write_recipe(tmp_path, bert, objective=listed, data={"max_length": 12, "excess_length": "truncate"})
    rows = [{"tokens": words, "ner_tags": [LABELS.index(TAGS[word]) for word in words]} for words in sentences(4)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    _, prepared = make_plan(load_recipe(recipe), device=CPU)
    objective: Any = prepared.rows.objective
    assert objective.rows.labels.names == tuple(LABELS)
    first = prepared.rows.train[0]
    assert objective.rows.labels_of(first) == ["B-PER", "I-PER", "O"]  # of "anna berg is": 12 bytes
    assert first.parts["firsts"].tolist() == [0, 5, 10]  # blanks are tokens of their own, and begin no word
    assert load_model(prepared.model, device=CPU).net.config.num_labels == 4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("row", "changes", "said"),
    [
        ({"words": ["a", "b"], "tags": ["O"]}, {}, r"train\.jsonl:25: 2 words, but 1 tags; write one tag for each"),
        ({"words": ["a", " "], "tags": ["O", "O"]}, {}, r"train\.jsonl:25: 'words\[1\]' is empty"),
        (
            {"words": ["a"], "tags": [3]},
            {},
            r"train\.jsonl:25: the tag 3 is not the number of a label: objective\.labels has 0 names",
        ),
        ({"words": ["a"], "tags": "O"}, {}, r"train\.jsonl:25: 'tags' must be a list, not str"),
        ({"words": ["a"], "tags": [None]}, {}, r"train\.jsonl:25: 'tags\[0\]' must be text, not null"),
        (
            {"words": ["a"], "tags": ["B-ORG"]},
            {"objective": {"method": "token_classify", "labels": LABELS}},
            r"train\.jsonl:25: the label 'B-ORG' is not among the labels \(B-LOC, B-PER, I-PER, O\)",
        ),
        (None, {"data": {"excess_length": "split"}}, r"data\.excess_length: a text is not split, because its label"),
    ],
)
def test_what_cannot_be_is_said(bert: Path, tmp_path: Path, row: Any, changes: dict[str, Any], said: str) -> None:
    recipe = write_recipe(tmp_path, bert, **changes)
    if row is not None:
        with (tmp_path / "train.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    with pytest.raises(TunekitError, match=said) as caught:
        raise_refusals(make_plan(load_recipe(recipe), device=CPU)[0])
    assert caught.value.exit_code == 2


CASES = {  # by seqeval's default mode
    "O B-PER I-PER O": [("PER", 1, 2)],
    "B-PER B-PER I-PER": [("PER", 0, 0), ("PER", 1, 2)],
    "I-PER I-PER O I-LOC": [("PER", 0, 1), ("LOC", 3, 3)],
    "B-PER I-LOC I-LOC": [("PER", 0, 0), ("LOC", 1, 2)],
    "B-A-B I-A-B": [("A-B", 0, 1)],
    "B I O I": [("_", 0, 1), ("_", 3, 3)],
    "B-X E-X E-X S-X I-X": [("X", 0, 1), ("X", 2, 2), ("X", 3, 3), ("X", 4, 4)],
    "S-X E-X I-X B-X": [("X", 0, 0), ("X", 1, 1), ("X", 2, 2), ("X", 3, 3)],
    "I-X E-Y I-Y O E-Y": [("X", 0, 0), ("Y", 1, 1), ("Y", 2, 2), ("Y", 4, 4)],
    "B-X S-X I-X E-X": [("X", 0, 0), ("X", 1, 1), ("X", 2, 3)],
    "O O": [],
}


@pytest.mark.parametrize("tags", CASES)
def test_spans_are_those_of_seqeval(tags: str) -> None:
    assert list(find_spans(tags.split())) == CASES[tags]


def test_span_f1_counts_whole_spans() -> None:
    assert kinds_of(["O", "B-PER", "I-PER", "I-LOC", "NOUN"]) == ["LOC", "PER"]
    assert from_sums({"spans": [[1, 2, 1], [1, 1, 4]]}) == pytest.approx(2 * 2 / (3 + 5))
    assert from_sums({"spans": []}) == from_sums({"spans": [[0, 0, 0]]}) == 0.0
