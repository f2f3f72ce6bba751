"""`objective: rerank`: rows, drawn negatives, evaluation by query, and runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.conftest import write_tiny_llama
from tests.support.embed_case import write_bert
from tests.support.loop_case import CPU
from tests.support.ranks_case import train_in_ranks
from tests.support.train_case import check_a_resume, losses, records, train, write_sections
from tunekit.contracts import EncodeOptions, Objective, Row, StepBatches
from tunekit.data.encoding.outcomes import Dropped
from tunekit.errors import DataError, RecipeError
from tunekit.evaluate import evaluate_verb
from tunekit.formats.reranking import RerankingExample, make_example
from tunekit.model.load import load_model
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.objectives.losses.query_metrics import ranking_metrics
from tunekit.objectives.losses.rerank import Pool
from tunekit.objectives.rerank import make
from tunekit.objectives.rows.candidates import filled, lines_of
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import ModelSection
from tunekit.recipe.objectives.rerank import RerankSettings
from tunekit.tuned.model import ModelRun, TunedModel

ROWS = 23
LOSSES = {  # the shape of the rows of each loss
    "binary_cross_entropy": "pairs",
    "multiple_negatives_ranking": "groups",
    "lambda": "lists",
    "ranknet": "lists",
    "listnet": "lists",
    "plistmle": "lists",
    "mse": "pairs",
    "margin_mse": "lists",
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    llama = write_tiny_llama(tmp_path_factory.mktemp("decoder"))
    return write_bert(tmp_path_factory.mktemp("encoder"), llama, 0.0)


def row_of(shape: str, number: int) -> dict[str, Any]:
    query = f"what is {'very ' * (number % 4)}{number // 2}"
    documents = [f"it is {'so ' * (each % 3)}{number + each} here" for each in range(2 + number % 3)]
    if shape == "pairs":
        return {"query": query, "document": documents[0], "label": number % 2}
    if shape == "lists":
        return {
            "query": query,
            "documents": documents,
            "labels": [(number + each) % 3 for each in range(len(documents))],
        }
    return {"query": query, "positive": documents[0]} | ({"negatives": documents[1:]} if number % 2 else {})


def write_case(folder: Path, base: Path, loss: str, **sections: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row_of(LOSSES[loss], number) for number in range(ROWS)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values: dict[str, Any] = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "data": {"train": [{"path": "train.jsonl"}], "eval": [{"path": "train.jsonl"}], "max_length": 64},
        "adapter": {"method": "lora", "r": 4, "dropout": 0.0},
        "objective": {"method": "rerank", "loss": loss},
        "training": {"learning_rate": 0.01, "micro_batch_size": 2, "gradient_accumulation_steps": 4, "epochs": 2.0},
        "output": {"dir": "run"},
    }
    return write_sections(folder, values, sections)


def objective_on(base: Path, loss: str = "binary_cross_entropy", **settings: Any) -> Objective:
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(base)))
    values = RerankSettings.model_validate({"method": "rerank", "loss": loss, **settings})
    return make(values, tokenizer, {}, EncodeOptions(max_length=64))


def test_columns_have_roles_by_name() -> None:
    assert make_example({"label": "1", "passage": "a", "question": "q"}) == RerankingExample("q", ("a",), (1.0,))
    lists = {"scores": [2, 0.5], "docs": '["a", "b"]', "query": "q"}
    assert make_example(lists) == RerankingExample("q", ("a", "b"), (2.0, 0.5))
    groups = {"negative_2": "d", "negative_1": "c", "positive": ["a", "b"], "anchor": "q"}
    assert make_example(groups) == RerankingExample("q", ("a", "b", "c", "d"), positives=2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "q", "question": "r", "document": "a"}, None),
        ({"anchor": "q", "question": "r", "document": "a"}, "'anchor' and 'question' could both be the query"),
        ({"query": "q", "documents": ["a"], "positive": "b", "labels": [1]}, "could both be the documents"),
        ({"query": "q", "documents": ["a", "b"], "labels": [1]}, "2 documents and 1 labels"),
        ({"query": "q", "documents": "a", "labels": [1]}, "must be a list of texts"),
        ({"query": "q", "document": "a", "label": "good"}, "'label' must be a number"),
        ({"query": "q"}, "no field 'document'"),
        ({"query": 3, "document": "a"}, "'query' must be text"),
    ],
)
def test_wrong_rows_are_one_line(row: dict[str, Any], message: str | None) -> None:
    if message is None:  # the field's own name comes first
        assert make_example(row).query == "q"
        return
    with pytest.raises(DataError, match=message):
        make_example(row)


@pytest.mark.parametrize(
    ("loss", "example", "message"),
    [
        ("binary_cross_entropy", RerankingExample("q", ("a",), positives=1), "one label of each"),
        ("binary_cross_entropy", RerankingExample("q", ("a",), (2.0,)), "from 0 to 1"),
        ("lambda", RerankingExample("q", ("a", "b"), (-1.0, 0.0)), "from 0 to 30"),
        ("mse", RerankingExample("q", ("a", "b"), positives=1), "one label of each"),
        ("margin_mse", RerankingExample("q", ("a",), (1.0,)), "a teacher's score"),
        ("multiple_negatives_ranking", RerankingExample("q", ("a", "b"), (1.0, 0.0)), "the row has labels"),
    ],
)
def test_rows_that_the_loss_cannot_use_are_errors(
    loss: str, example: RerankingExample, message: str, bert: Path
) -> None:
    with pytest.raises(DataError, match=message):
        objective_on(bert, loss).rows.encode(example, "")


def test_rows_without_anything_to_learn_are_dropped(bert: Path) -> None:
    for loss, example, reason in (
        ("binary_cross_entropy", RerankingExample("q", (" ",), (1.0,)), "empty"),
        ("ranknet", RerankingExample("q", ("a", "b"), (1.0, 1.0)), "nothing to compare"),
        ("listnet", RerankingExample("q", ("a",), (1.0,)), "nothing to compare"),
        ("lambda", RerankingExample("q", ("a", "a "), (1.0, 0.0)), "two documents"),
    ):
        with pytest.raises(Dropped, match=reason):
            objective_on(bert, loss).rows.encode(example, "")


def test_lines_are_the_tokenizers_pairs_also_when_cut(bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bert)
    rows = objective_on(bert).rows
    row = rows.encode(RerankingExample("what is it", ("this " * 9, "no"), (1.0, 0.0)), "")
    pairs = [("what is it", "this " * 9), ("what is it", "no")]
    assert [list(line) for line in lines_of(row)] == tokenizer(*map(list, zip(*pairs, strict=True)))["input_ids"]
    cut = rows.cut(row, 0, 17)
    wanted = tokenizer(*map(list, zip(*pairs, strict=True)), truncation=True, max_length=17)["input_ids"]
    assert [list(line) for line in lines_of(cut)] == wanted
    assert rows.layout.length(cut.sizes) == 17


@pytest.mark.parametrize("tied", [False, True])
def test_the_score_of_a_decoder_starts_as_the_logit_of_yes_minus_that_of_no(tied: bool, tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "decoder")
    if tied:
        config = LlamaConfig.from_pretrained(base, tie_word_embeddings=True)
        LlamaForCausalLM(config).save_pretrained(base)
    section = ModelSection(name_or_path=str(base), dtype="float32")
    settings = RerankSettings.model_validate({"method": "rerank", "template": "{query}? {document}. "})
    for case, facts in ((settings, {"answers": True}), (RerankSettings(), {"answers": True})):
        objective = make(case, load_tokenizer(section), facts, EncodeOptions(max_length=999))
        template, tokenizer = objective.facts["template"], AutoTokenizer.from_pretrained(base)
        loaded = load_model(objective.section(section, 0), device=CPU)
        assert loaded.family.name == "classifier"
        batch = objective.rows.collate([[objective.rows.row_of(("what", "it is", "no"), [1.0, 0.0])]])
        scores = objective.loss.scores(TunedModel(loaded, None).output(batch.inputs), batch)
        net = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        yes, no = (tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in ("yes", "no"))
        for score, document in zip(scores.tolist(), ("it is", "no"), strict=True):
            ids = tokenizer(filled(template, "what", document), add_special_tokens=False, return_tensors="pt")
            logits = net(**ids).logits[0, -1]
            assert score == pytest.approx(float(logits[yes] - logits[no]), abs=1e-5)


def test_a_decoder_is_trained_with_its_question(tmp_path: Path) -> None:
    """The adapter's folder states the template; a cut document keeps the question's end."""
    base = write_tiny_llama(tmp_path / "decoder")
    data = {"excess_length": "truncate", "max_length": 150}
    run = train(write_case(tmp_path, base, "lambda", data=data, training={"max_steps": 2, "epochs": None}))
    facts = json.loads((run / "adapter" / "tunekit.json").read_text("utf-8"))["objective"]
    assert "Query: {query}" in facts["template"]
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    assert saved["base_model.model.score.weight"].shape[0] == 1
    rows = make(RerankSettings(), load_tokenizer(ModelSection(name_or_path=str(base))), facts, EncodeOptions()).rows
    row = rows.encode(RerankingExample("q", ("word " * 99,), (1.0,)), "")
    cut = rows.cut(row, 0, 150)
    assert cut.sizes[0] == 150
    end = len(rows.ending)
    assert lines_of(cut)[0][-end:] == lines_of(row)[0][-end:] == rows.ending
    assert lines_of(cut)[0][:-end] == lines_of(row)[0][: 150 - end]


def test_a_template_is_filled_once() -> None:
    assert filled("Q: {query} D: {document}?", "a {document}", "b {query}") == "Q: a {document} D: b {query}?"
    assert filled("{document} | {query}", "a", "b") == "b | a"


def prepared(objective: Objective, base: Path, batches: list[list[Row]]) -> list[Row]:
    """The rows of a step with these batches, after it was prepared."""
    section = objective.section(ModelSection(name_or_path=str(base), dtype="float32"), 0)
    run = ModelRun(TunedModel(load_model(section, device=CPU), None), objective.rows)
    made = tuple(objective.rows.collate([[row] for row in rows]) for rows in batches)
    step = StepBatches(4, 0.0, tuple(range(len(made))), made, seed=7)
    return [row for batch in objective.prepare_step(run, step).batches for row in batch.rows]


def test_negatives_are_drawn_from_the_step_for_any_micro_batches(bert: Path) -> None:
    objective = objective_on(bert, "multiple_negatives_ranking", num_negatives=3)
    rows = [
        replace(objective.rows.encode(make_example(row_of("groups", number)), f"d:{number}"), number=number)
        for number in range(8)
    ]
    one, other = prepared(objective, bert, [rows]), prepared(objective, bert, [rows[5:], rows[:2], rows[2:5]])
    by_number = {row.number: row for row in other}
    of_query: dict[int, set[int]] = {}
    for row in rows:
        of_query.setdefault(int(row.parts["keys"][0]), set()).update(row.parts["keys"][1:].tolist())
    for row, before in zip(one, rows, strict=True):
        assert row.parts["ids"].tolist() == by_number[row.number].parts["ids"].tolist()
        drawn = row.parts["keys"].tolist()[len(before.parts["keys"]) :]
        assert len(drawn) == len(set(drawn)) == 3
        assert not {*drawn} & of_query[int(row.parts["keys"][0])]  # also not of other rows with this query
        assert row.parts["labels"].tolist() == [1.0, *[0.0] * (len(row.parts["counts"]) - 1)]
        assert row.sizes == objective.rows.sizes_of(row.parts)
    assert any(
        row.parts["keys"].tolist() != before.parts["keys"].tolist() for row, before in zip(one, rows, strict=True)
    )


def test_a_pool_draws_every_document_equally_often() -> None:
    pool = Pool([[f"q{number}", f"d{number}"] for number in range(6)])
    counts = dict.fromkeys([f"d{number}" for number in range(1, 6)], 0)
    for seed in range(2000):
        for text in pool.draw(["q0", "d0"], 2, seed):
            counts[text] += 1
    assert min(counts.values()) > 700
    assert sorted(pool.draw(["q0", "d0"], 99, 0)) == sorted(counts)


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_trains_and_does_not_depend_on_micro_batches(loss: str, bert: Path, tmp_path: Path) -> None:
    training = {"max_steps": 2, "epochs": None, "eval_steps": 1}
    runs = []
    for size, accumulated in ((1, 8), (8, 1)):
        sizes = {"micro_batch_size": size, "gradient_accumulation_steps": accumulated}
        runs.append(train(write_case(tmp_path / str(size), bert, loss, training={**training, **sizes})))
    first, second = ([record.get("loss", record.get("eval")) for record in records(run)] for run in runs)
    for ours, theirs in zip(first, second, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4 if loss == "mse" else 2e-5)  # correlations are less exact
    names = {"spearman", "pearson"} if loss == "mse" else {"ndcg_at_10", "mrr_at_10", "map"}
    assert first[-1].keys() == {"loss", *names}
    assert losses(runs[0])[0] > 0


def test_pairs_with_one_query_are_ranked_together(bert: Path, tmp_path: Path) -> None:
    """Independently of the batch size, and for the adapter as for its run."""
    run = train(write_case(tmp_path, bert, "binary_cross_entropy", training={"max_steps": 2, "epochs": None}))
    rows = [
        {"query": f"what is {query}", "document": f"it is {query} {document}", "label": int(document == query % 4)}
        for document in range(4)
        for query in range(5)
    ]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = []
    for target, size in ((run, 1), (run / "adapter", 7)):
        path = tmp_path / f"{size}.json"
        overrides = [f"evaluation.batch_size={size}"]
        evaluate_verb(str(target), str(bert), str(tmp_path / "held.jsonl"), None, (), path, overrides)
        found.append(json.loads(path.read_text("utf-8")))
    for name in ("loss", "ndcg_at_10", "mrr_at_10", "map"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5)
    by_hand = [scored(run, bert, [row for row in rows if row["query"] == f"what is {query}"]) for query in range(5)]
    wanted = np.mean([ranking_metrics([row["label"] for row in some], scores) for some, scores in by_hand], axis=0)
    assert [found[0][name] for name in ("ndcg_at_10", "mrr_at_10", "map")] == pytest.approx(wanted.tolist())


def scored(run: Path, base: Path, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[float]]:
    """The distinct rows of a query and their scores, by transformers with PEFT's adapter."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    distinct = list({row["document"]: row for row in rows}.values())
    tokenizer = AutoTokenizer.from_pretrained(base)
    net = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    net = PeftModel.from_pretrained(net, run / "adapter").eval()
    with torch.no_grad():
        scores = [
            float(net(**tokenizer(row["query"], row["document"], return_tensors="pt")).logits[0, 0]) for row in distinct
        ]
    return distinct, scores


def test_a_killed_run_resumes_with_the_same_bytes(bert: Path, tmp_path: Path) -> None:
    loss = "multiple_negatives_ranking"
    check_a_resume(write_case(tmp_path, bert, loss, training={"max_steps": 4, "epochs": None, "save_steps": 2}))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["multiple_negatives_ranking", "lambda"])
def test_two_ranks_give_the_curve_of_one(loss: str, bert: Path, tmp_path: Path) -> None:
    recipe = write_case(tmp_path, bert, loss)
    for world in (1, 2):
        run, steps = tmp_path / f"run{world}", "training.gradient_accumulation_steps=3"
        for ended in train_in_ranks(recipe, run, steps, world=world):
            assert ended.code == 0, ended.text
    one, two = (losses(tmp_path / f"run{world}") for world in (1, 2))
    assert one == pytest.approx(two, rel=2e-5)
    assert len(one) == len(two) > 4


def test_the_best_checkpoint_is_chosen_by_ndcg(bert: Path, tmp_path: Path) -> None:
    """The rate is so high that the last step is rarely the best."""
    training = {"max_steps": 6, "epochs": None, "learning_rate": 0.3, "eval_steps": 1, "save_steps": 1}
    evaluation = {"metrics": ["ndcg_at_10"], "best": "eval.ndcg_at_10"}
    run = train(write_case(tmp_path, bert, "lambda", training=training, evaluation=evaluation))
    values = {record["step"]: record["eval"]["ndcg_at_10"] for record in records(run) if "eval" in record}
    report = json.loads((run / "report.json").read_text("utf-8"))
    assert values[report["best_step"]] == max(value for step, value in values.items() if step)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "lambda", "scale": 3.0}, "scale: has an effect only with loss multiple_negatives_ranking"),
        ({"pos_weight": 2.0, "loss": "mse"}, "pos_weight: has an effect only with loss binary_cross_entropy"),
        ({"loss": "hinge"}, "hinge"),
        ({"template": "{query}"}, "template: must contain {query} and {document} once each"),
    ],
)
def test_settings_without_effect_are_errors(settings: dict[str, Any], message: str, bert: Path, tmp_path: Path) -> None:
    recipe = write_case(tmp_path, bert, "lambda", objective=settings)
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe)
