"""`tunekit serve` and `tunekit generate --score` with a reranker: the scores of transformers, and hostile requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.conftest import write_tiny_llama
from tests.support.embed_case import write_bert
from tests.support.train_case import train, write_sections
from tests.test_serve import ask_raw, running
from tunekit.errors import DataError, InputError
from tunekit.generate import generate_verb
from tunekit.merge import merge_verb
from tunekit.serve import make_app, make_server, serve_verb
from tunekit.talking.reranking import RerankDesk, make_reranker
from tunekit.targets.target import find_target, load_target

pytest.importorskip("uvicorn")
QUERY, DOCUMENTS = "what is 1", ["it is 1", "it is so so so 2 " * 40, "no"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    base = write_bert(tmp_path_factory.mktemp("encoder"), write_tiny_llama(tmp_path_factory.mktemp("decoder")), 0.0)
    rows = [{"query": f"what is {n}", "document": f"it is {n % 5}", "label": n % 2} for n in range(16)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe: dict[str, Any] = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "data": {"train": [{"path": "train.jsonl"}]},
        "adapter": {"method": "lora", "r": 4},
        "objective": {"method": "rerank"},
        "training": {"learning_rate": 0.05, "max_steps": 3},
        "output": {"dir": "mine"},
    }
    return train(write_sections(folder, recipe, {}))


@pytest.fixture(scope="module")
def wanted(run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The probabilities by the merged folder in transformers."""
    folder = tmp_path_factory.mktemp("merged") / "model"
    merge_verb(str(run / "adapter"), str(folder), None, None, [])
    net, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    cut = {"truncation": True, "max_length": 512, "return_tensors": "pt"}
    with torch.no_grad():
        return [float(net(**tokenizer(QUERY, text, **cut)).logits[0, 0].sigmoid()) for text in DOCUMENTS]


@pytest.fixture(scope="module")
def port(run: Path) -> Iterator[int]:
    desk = RerankDesk(make_reranker(load_target(find_target(str(run), None, []), torch.device("cpu")), 2), "mine")
    with running(make_server(desk, make_app(desk, None, 16))) as port:
        yield port


def asked(port: int, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
    status, reply = ask_raw(port, path, json.dumps({"model": "mine", **body}).encode())
    return status, json.loads(reply)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank"])
def test_documents_are_sorted_by_their_score(path: str, port: int, wanted: list[float]) -> None:
    status, reply = asked(port, path, query=QUERY, documents=[DOCUMENTS[0], {"text": DOCUMENTS[1]}, DOCUMENTS[2]])
    assert status == 200
    order = sorted(range(3), key=lambda place: -wanted[place])
    assert [each["index"] for each in reply["results"]] == order
    scores = [each["relevance_score"] for each in reply["results"]]
    assert scores == pytest.approx([wanted[place] for place in order], rel=1e-5)
    assert reply["usage"]["total_tokens"] > 512
    _, first = asked(port, path, query=QUERY, documents=DOCUMENTS, top_n=1, return_documents=True)
    [only] = first["results"]
    assert only["document"] == {"text": DOCUMENTS[order[0]]}


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_pairs_are_scored_in_their_order(path: str, port: int, wanted: list[float]) -> None:
    for first in (QUERY, [QUERY] * 3):
        status, reply = asked(port, path, text_1=first, text_2=DOCUMENTS)
        assert status == 200
        assert [each["score"] for each in reply["data"]] == pytest.approx(wanted, rel=1e-5)
        assert [each["index"] for each in reply["data"]] == [0, 1, 2]
    assert asked(port, path, text_1=QUERY, text_2=DOCUMENTS[0])[1]["data"][0]["score"] == pytest.approx(wanted[0])


GOOD = {"query": QUERY, "documents": DOCUMENTS}
HOSTILE: list[tuple[str, dict[str, Any], int, str]] = [
    ("/rerank", {**GOOD, "model": "other"}, 404, "there is no model"),
    ("/rerank", {**GOOD, "query": None}, 400, "'query' must be a text"),
    ("/rerank", {**GOOD, "query": ["a"]}, 400, "'query' must be a text"),
    ("/rerank", {**GOOD, "query": "  "}, 400, "empty"),
    ("/rerank", {**GOOD, "documents": []}, 400, "'documents' must be a list of texts"),
    ("/rerank", {**GOOD, "documents": "a"}, 400, "'documents' must be a list of texts"),
    ("/rerank", {**GOOD, "documents": [1]}, 400, "'documents' must be a list of texts"),
    ("/rerank", {**GOOD, "documents": [{"title": "a"}]}, 400, "'documents' must be a list of texts"),
    ("/rerank", {**GOOD, "documents": ["a", ""]}, 400, "empty"),
    ("/rerank", {**GOOD, "documents": ["a"] * 3000}, 400, "more than 2048"),
    ("/rerank", {**GOOD, "top_n": 0}, 400, "'top_n' must be a number from 1"),
    ("/rerank", {**GOOD, "top_n": 1.5}, 400, "'top_n' must be a whole number"),
    ("/rerank", {**GOOD, "top_n": True}, 400, "'top_n' must be a number"),
    ("/rerank", {**GOOD, "return_documents": "yes"}, 400, "'return_documents' must be true or false"),
    ("/rerank", {**GOOD, "documents": ["\ud800"]}, 400, ""),
    ("/rerank", {**GOOD, "instruction": "x"}, 400, "not a known field"),
    ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, 400, "'text_1' has 2 texts and 'text_2' has 3"),
    ("/score", {"text_1": "a"}, 400, "'text_2' must be a text or a list of texts"),
    ("/score", {"text_1": {}, "text_2": "b"}, 400, "'text_1' must be a text or a list of texts"),
    ("/score", {"text_1": [], "text_2": []}, 400, "'text_1' must be a text or a list of texts"),
    ("/score", GOOD, 400, "not a known field"),
    ("/v1/chat/completions", {"messages": []}, 404, ""),
    ("/v1/embeddings", {"input": "a"}, 404, ""),
]


def test_hostile_requests_get_one_line_and_the_server_answers_on(port: int) -> None:
    for path, body, status, message in HOSTILE:
        found, reply = asked(port, path, **body)
        assert (found, message in reply["error"]["message"]) == (status, True), (path, body, reply)
    for raw in (b"", b"[]", b"{", b"null", b'{"model": NaN}', b"\xff", b"[" * 5000):
        assert ask_raw(port, "/rerank", raw)[0] == 400
    assert asked(port, "/rerank", **GOOD)[0] == 200


def test_options_without_effect_are_refused(run: Path) -> None:
    with pytest.raises(InputError, match="the target scores documents"):
        serve_verb(str(run), None, [], [str(run / "adapter")], "127.0.0.1", 0, None, 16, 1)


def test_generate_scores_a_file(
    run: Path, wanted: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"query": QUERY, "documents": DOCUMENTS}, {"query": QUERY, "document": DOCUMENTS[0], "label": 1}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    generate_verb(str(run), None, None, None, [], score=str(path))
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["scores"] == pytest.approx(wanted, rel=1e-5)
    assert second == {**rows[1], "score": pytest.approx(wanted[0], rel=1e-5)}
    path.write_text('{"query": "a", "documents": ["b", ""]}\n{"query": "a"}\n', encoding="utf-8")
    with pytest.raises(DataError) as error:
        generate_verb(str(run), None, None, None, [], score=str(path))
    assert [problem.line for problem in error.value.problems] == [1, 2]
    with pytest.raises(InputError, match="does not generate answers; score answers with --score FILE"):
        generate_verb(str(run), None, ["a"], None, [])
