"""The verbs after the training of a text classifier: what they read, and what they refuse before they load it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import BertForSequenceClassification

from tests.objectives.test_classify import bert as bert
from tests.objectives.test_classify import llama as llama
from tests.objectives.test_classify import texts, write_recipe
from tests.support.plans import make_plan
from tests.support.train_case import train
from tunekit.adapter import diff_verb
from tunekit.chat import chat_verb
from tunekit.console import Console
from tunekit.console.progress import StepProgress
from tunekit.errors import TunekitError
from tunekit.evaluate import evaluate_verb
from tunekit.export import export_verb
from tunekit.generate import generate_verb
from tunekit.metrics.classes import class_facts, class_table, confused_pairs, never_right
from tunekit.planning.checks import raise_refusals
from tunekit.recipe.load import load_recipe
from tunekit.records import EvaluationRecord
from tunekit.targets.target import find_target, load_target

ONCE = {"epochs": None, "max_steps": 1, "warmup_steps": 0}
PAIR = {"sentence1": "good", "sentence2": "bad", "label": "positive"}


@pytest.fixture(scope="module")
def run(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    return train(write_recipe(folder, bert, training=ONCE, data={"eval": "test.jsonl"}))


def answers(run: Path, prompts: Path, capfd: pytest.CaptureFixture[str]) -> list[str]:
    capfd.readouterr()
    generate_verb(str(run), None, None, str(prompts), [])
    return [json.loads(line)["prompt"] for line in capfd.readouterr().out.splitlines()]


def test_prompts_are_read_from_columns(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.csv").write_text('label,text\nx,"good, so\nso"\ny,bad\n', encoding="utf-8")
    assert answers(run, tmp_path / "rows.csv", capfd) == ["good, so\nso", "bad"]
    rows = [{"label": "x", "text": "good, so\nso"}, {"label": "y", "text": "bad"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for ending in ("json", "parquet"):
        assert answers(run, tmp_path / f"rows.{ending}", capfd) == ["good, so\nso", "bad"]
    (tmp_path / "none.csv").write_text("label,text\n", encoding="utf-8")
    with pytest.raises(TunekitError, match=r"none\.csv: it contains no prompt"):
        answers(run, tmp_path / "none.csv", capfd)
    assert answers(run, run.parent / "test.jsonl", capfd) == [text for text, _ in texts(12)]
    (tmp_path / "rows.csv").write_text("label,review\nx,good\n", encoding="utf-8")
    with pytest.raises(TunekitError, match=r"rows\.csv:2: has no text under 'prompt' or 'text'"):
        answers(run, tmp_path / "rows.csv", capfd)


def test_pairs_are_refused_by_a_classifier_of_single_texts(run: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n", encoding="utf-8")
    with pytest.raises(TunekitError, match=r"pairs\.jsonl:1: the row is a pair of texts"):
        evaluate_verb(str(run), None, str(tmp_path / "pairs.jsonl"), None, [], None, [])
    with pytest.raises(TunekitError, match="the prompt is a pair of texts"):
        generate_verb(str(run), None, None, str(tmp_path / "pairs.jsonl"), [])


def test_eval_refuses_before_it_loads(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TunekitError, match="no metric mse"):
        evaluate_verb(str(run), None, None, None, ["mse"], None, [])
    with pytest.raises(TunekitError, match=r"nope\.csv: no such file; check the path of --data"):
        evaluate_verb(str(run), None, str(tmp_path / "nope.csv"), None, [], None, [])
    moved = Path(shutil.copytree(run, tmp_path / "a" / "b" / "run"))
    earlier = run.parent / "test.jsonl"
    with pytest.raises(TunekitError, match=rf"no such file \(in training it was {earlier}\); .*with --data FILE"):
        evaluate_verb(str(moved), None, None, None, [], None, [])
    assert "loading" not in capsys.readouterr().out


def test_chat_names_the_verb_for_classifiers(run: Path) -> None:
    with pytest.raises(TunekitError, match="does not generate text; use `tunekit generate`"):
        chat_verb(str(run), None, [], [], None, None, (0.0, 1.0, 0, 0), None)


def test_lists_as_labels_are_one_problem(bert: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, bert)
    rows = [json.dumps({"text": "so", "label": label}) + "\n" for label in ([], ["a"], ["b"], ["a", "b"])]
    (tmp_path / "train.jsonl").write_text("".join(rows), encoding="utf-8")
    with pytest.raises(TunekitError) as caught:
        raise_refusals(make_plan(load_recipe(recipe))[0])
    assert [problem.line for problem in caught.value.problems] == [1]
    assert "(3 more: line 2, 3, 4)" in str(caught.value)


def test_heads_of_two_sizes_are_not_compared(
    run: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, bert, training=ONCE)
    for name in ("train", "test"):
        rows = [json.dumps({"text": text, "label": label[0]}) + "\n" for text, label in [("good", "p"), ("bad", "n")]]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    other = train(recipe)
    capsys.readouterr()
    diff_verb(str(run / "adapter"), str(other / "adapter"), None, None, None, None, None)
    shown = capsys.readouterr().out
    assert "2 tensors that are not compared, because their shapes in A and B differ: " in shown
    assert "classifier.bias" not in shown.partition("not compared")[0]


def test_an_undefined_correlation_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    StepProgress(Console(), 1).evaluation(EvaluationRecord(0, {"loss": float("nan"), "pearson": float("nan")}))
    assert capsys.readouterr().out == "step 0  eval  loss nan\n"


def test_an_encoder_without_a_head_is_not_called_unknown(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(TunekitError, match="architecture BertModel has no head for this objective"):
        make_plan(load_recipe(write_recipe(tmp_path, bert, objective="sft", data={"eval": None})))


@pytest.mark.drawn
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_code_of_a_card_computes_the_scores(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Also for three labels (transformers' default is two), and for a base with a head of other labels."""
    base = shutil.copytree(request.getfixturevalue(name), tmp_path / "base")
    if name == "bert":
        BertForSequenceClassification.from_pretrained(base, num_labels=5).save_pretrained(base)
    run = train(write_recipe(tmp_path, base, training={"epochs": None, "max_steps": 2}))
    export_verb(str(run), "hub", str(tmp_path / "labels"))
    code = (tmp_path / "labels" / "README.md").read_text("utf-8").split("```")[1].removeprefix("python\n")
    places = {'"NAMESPACE/base"': repr(str(base)), '"NAMESPACE/labels"': repr(str(tmp_path / "labels"))}
    for written, place in places.items():
        code = code.replace(written, place)
    names: dict[str, Any] = {}
    exec(code, names)
    loaded = load_target(find_target(str(run), None, ["model.dtype=float32"]), torch.device("cpu"))
    ids = torch.tensor([loaded.tokenizer.encode("good so so")])
    model, ours = names["model"].eval(), loaded.model.base.net
    assert list(model.config.id2label.values()) == ["no", "perhaps", "yes"]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, ours(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_the_worst_pairs_and_the_labels_without_a_right_row() -> None:
    labels = [f"l{number}" for number in range(77)]
    matrix = [[5 * (row == column) for column in range(77)] for row in range(77)]
    matrix[3][3], matrix[3][4], matrix[6][5] = 0, 5, 2
    counts = [[matrix[n][n], sum(row[n] for row in matrix), sum(matrix[n])] for n in range(77)]
    facts = class_facts(class_table(labels, counts, matrix))
    assert confused_pairs(facts) == (
        ["true label", "predicted as", "rows"],
        [["l3", "l4", 5], ["l6", "l5", 2]],
    )
    assert never_right(facts) == ["l3"]
    assert confused_pairs(class_facts(class_table(["a"], [[1, 1, 1]], [[1]]))) is None
