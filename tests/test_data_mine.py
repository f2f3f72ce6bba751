"""`tunekit data mine` adds negatives to rows of queries and documents; `data check` of such rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import write_tiny_llama
from tests.objectives.test_embed import train, write_bert, write_case
from tunekit.data_check import data_check_verb
from tunekit.data_mine import data_mine_verb
from tunekit.errors import InputError
from tunekit.recipe.load import load_recipe
from tunekit.talking.reranking import Reranker

LINES = [
    {"query": "first", "document": "one", "number": 7},
    {"query": "second", "document": "two", "negatives": ["nobody"], "number": 8},
    {"query": "first", "document": "uno", "negative": "two", "number": 9},
    {"query": "third", "document": "first", "number": 10},
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    llama = write_tiny_llama(tmp_path_factory.mktemp("decoder"))
    return write_bert(tmp_path_factory.mktemp("encoder"), llama, 0.0)


def write_rows(folder: Path, bert: Path, objective: dict[str, Any] | None = None) -> Path:
    recipe = write_case(folder, bert, objective, data={"eval": None})
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    return recipe


def mine(
    target: Path, output: Path, negatives: int = 2, margin: float = 0.0, reranker: str | None = None
) -> tuple[list[Any], dict[str, Any]]:
    report = output.with_suffix(".json")
    data_mine_verb(str(target), str(output), str(report), [], negatives=negatives, margin=margin, reranker=reranker)
    lines = output.read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines], json.loads(report.read_text("utf-8"))


def test_rows_keep_their_columns_and_get_other_documents(bert: Path, tmp_path: Path) -> None:
    """Each text is a possible negative, except the query, its positives and the negatives that its rows have."""
    rows, report = mine(write_rows(tmp_path, bert), tmp_path / "mined.jsonl", negatives=9)
    assert [row["number"] for row in rows] == [7, 8, 9, 10]
    assert rows[1]["negatives"][0] == "nobody"
    assert rows[2]["negative"] == "two"
    possible = [{"nobody"}, {"nobody", "one", "uno", "first"}, {"nobody"}, {"one", "two", "uno", "nobody"}]
    for row, texts in zip(rows, possible, strict=True):
        assert set(row["negatives"]) <= texts
    assert (report["rows"], report["queries"], report["documents"]) == (4, 3, 5)
    found = sum(int(number) * rows for number, rows in report["rows_by_new_negatives"].items())
    assert found == sum(len(row["negatives"]) for row in rows) - 1
    assert report["left_out"] | {"too_similar": 0} == {"positives": 4, "known": 3, "too_similar": 0}


def test_documents_of_a_corpus_are_negatives_too(bert: Path, tmp_path: Path) -> None:
    """They are searched in addition to the documents of the rows. A positive or a known negative is none."""
    recipe, corpus = write_rows(tmp_path, bert), tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "eins", "zwei")), encoding="utf-8")
    output, report = tmp_path / "mined.jsonl", tmp_path / "report.json"
    options: dict[str, Any] = {"negatives": 9, "margin": 0.0, "corpus": str(corpus)}
    data_mine_verb(str(recipe), str(output), str(report), [], **options)
    rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    found = {text for row in rows for text in row["negatives"]}
    assert found & {"eins", "zwei"}
    assert found <= {"nobody", "one", "two", "uno", "first", "eins", "zwei"}
    assert "one" not in rows[0]["negatives"]
    assert json.loads(report.read_text("utf-8"))["documents"] == 7


def test_rows_of_a_guided_run_are_mined_without_the_guide(bert: Path, tmp_path: Path) -> None:
    guided = write_rows(tmp_path, bert, {"loss": "gist", "guide": {"name_or_path": str(tmp_path / "absent")}})
    rows, _ = mine(guided, tmp_path / "mined.jsonl")
    assert [row["number"] for row in rows] == [7, 8, 9, 10]


def test_a_larger_margin_leaves_out_more_documents(bert: Path, tmp_path: Path) -> None:
    recipe = write_rows(tmp_path, bert)
    left_out = [
        mine(recipe, tmp_path / f"{number}.jsonl", margin=margin)[1]["left_out"]["too_similar"]
        for number, margin in enumerate((0.0, 1.0))
    ]
    assert left_out[0] < left_out[1] == 8


def test_a_run_searches_with_its_adapter_and_the_rows_train(bert: Path, tmp_path: Path) -> None:
    run = train(write_case(tmp_path, bert, data={"eval": None}))
    rows, report = mine(run, tmp_path / "mined.jsonl")
    assert report["mean_cosine"]["positive"] > report["mean_cosine"]["first_negative"]
    assert all(len(row["negatives"]) <= 2 for row in rows)
    train(
        tmp_path / "recipe.yaml",
        f"data.train={tmp_path / 'mined.jsonl'}",
        f"output.dir={tmp_path / 'second'}",
        "training.max_steps=1",
        "~training.epochs",
    )


def test_a_reranker_decides_which_documents_are_negatives(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of the objective rerank; then with scores that are known: the longer the document, the lower."""
    rows = [{"query": row["query"], "document": row["document"], "label": n % 2} for n, row in enumerate(LINES)]
    reranking = write_case(tmp_path / "reranker", bert, {"method": "rerank"}, data={"eval": None})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "reranker" / "train.jsonl").write_text(lines, encoding="utf-8")
    scorer, recipe = str(train(reranking, "training.max_steps=1", "~training.epochs")), write_rows(tmp_path, bert)
    found, report = mine(recipe, tmp_path / "mined.jsonl", negatives=1, reranker=scorer)
    assert set(report["mean_probability"]) == {"positive", "first_negative"}
    assert all(len(row["negatives"]) <= 1 + (row["number"] == 8) for row in found)

    monkeypatch.setattr(Reranker, "encode", lambda self, query, document: document)
    by_length = staticmethod(lambda documents: torch.tensor([1 / len(text) for text in documents]))
    monkeypatch.setattr(Reranker, "probabilities", by_length)
    found, report = mine(recipe, tmp_path / "again.jsonl", negatives=1, margin=0.2, reranker=scorer)
    assert [row["negatives"] for row in found] == [["nobody"], ["nobody", "first"], ["nobody"], []]
    assert report["left_out"]["too_similar"] == 6  # of "second": one, uno; of "third": one, two, uno, nobody
    with pytest.raises(InputError, match="was trained with embed, so it does not score documents; name a reranker"):
        mine(recipe, tmp_path / "third.jsonl", reranker=str(train(recipe, "training.max_steps=1", "~training.epochs")))


def test_targets_without_queries_and_documents_are_refused(bert: Path, tmp_path: Path) -> None:
    for target, message in (
        (write_rows(tmp_path, bert, {"loss": "cosent"}), "the recipe trains with the loss cosent; use the objective"),
        (bert, "has no recipe, so it names no training rows; name a recipe or a run"),
    ):
        with pytest.raises(InputError, match=message):
            mine(target, tmp_path / "mined.jsonl")
    with pytest.raises(InputError, match=r"contains lists or objects, but a table cannot contain them"):
        mine(write_rows(tmp_path, bert), tmp_path / "mined.csv")


def test_data_check_finds_doubtful_rows_of_texts(bert: Path, tmp_path: Path) -> None:
    """Line 5 has the texts of an evaluation row, and a negative; the document of line 6 is cut to 16 tokens."""
    recipe = write_case(tmp_path, bert, {"max_lengths": {"document": 16}}, data={"eval": [{"path": "eval.jsonl"}]})
    rows: list[dict[str, Any]] = [
        {"query": "first", "document": "one"},
        {"query": "first", "document": "One!"},
        {"query": "first", "document": "one", "negative": "two"},
        {"query": "same", "document": "same"},
        {"query": "held", "document": "out", "negative": "in"},
        {"query": "long", "document": "more than sixteen bytes"},
        {"query": "number", "document": "given", "score": 0.5},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "eval.jsonl").write_text(json.dumps({"query": "held", "document": "out"}), encoding="utf-8")
    report = tmp_path / "report.json"
    assert data_check_verb(load_recipe(recipe), None, str(report)) == 2
    findings = json.loads(report.read_text("utf-8"))["files"][0]["findings"]
    assert findings == {"exact": [2], "dropped": [4], "leak": [5], "cut": [6], "broken": [7]}


def test_data_check_finds_pairs_with_two_scores(bert: Path, tmp_path: Path) -> None:
    recipe, report = write_case(tmp_path, bert, {"loss": "cosine"}, data={"eval": None}), tmp_path / "report.json"
    scores = {"a": 1, "b": 0, "c": 1.5}
    rows = [{"sentence1": "x", "sentence2": name, "score": score} for name, score in scores.items()]
    rows += [{"sentence1": "x", "sentence2": "a", "score": 0.5}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert data_check_verb(load_recipe(recipe), None, str(report)) == 2
    assert json.loads(report.read_text("utf-8"))["files"][0]["findings"] == {"broken": [3], "contrary": [4]}
