"""`tunekit serve` with an embedding model: the vectors of generate, sent by the openai client, and hostile requests."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.conftest import write_tiny_llama
from tests.support.embed_case import write_bert, write_newer_schema
from tests.support.train_case import train, write_sections
from tests.test_serve import JSON, ask_raw, client, running
from tunekit.errors import InputError
from tunekit.serve import make_app, make_server, serve_verb
from tunekit.talking.embedder import Embedder, make_embedder
from tunekit.talking.embedding_desk import EmbeddingDesk
from tunekit.talking.protocol import EmbeddingQuestion
from tunekit.targets.target import find_target, load_target

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
PATH = "/v1/embeddings"
BODY = {"model": "base", "input": "what is 1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sentence-transformers whose queries have a prompt."""
    llama = write_tiny_llama(tmp_path_factory.mktemp("decoder"))
    folder = write_bert(tmp_path_factory.mktemp("encoder"), llama, 0.0)
    write_newer_schema(folder)
    return folder


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Embedder:
    return make_embedder(load_target(find_target(str(folder), None, ["model.dtype=float32"]), torch.device("cpu")), 4)


@pytest.fixture(scope="module")
def port(embedder: Embedder) -> Iterator[int]:
    desk = EmbeddingDesk(embedder, "encoder")
    with running(make_server(desk, make_app(desk, None, 16))) as port:
        yield port


def expected(embedder: Embedder, texts: list[str], side: str = "document") -> torch.Tensor:
    return embedder.embed([embedder.encode(text, side) for text in texts])


def asked(port: int, **more: Any) -> tuple[int, dict[str, Any]]:
    status, body = ask_raw(port, PATH, json.dumps(BODY | more).encode())
    return status, json.loads(body)


def test_clients_get_the_embeddings_of_generate(port: int, embedder: Embedder) -> None:
    texts = [f"text {'so ' * (number % 7)}{number}" for number in range(11)]
    api, vectors = client(port), expected(embedder, texts)
    assert [model.id for model in api.models.list()] == ["base"]
    reply = api.embeddings.create(model="base", input=texts)  # this client asks for base64
    assert [entry.index for entry in reply.data] == list(range(11))
    torch.testing.assert_close(torch.tensor([entry.embedding for entry in reply.data]), vectors)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens > len(texts)
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda text: api.embeddings.create(model="base", input=text), texts))
    for reply, vector in zip(replies, vectors, strict=True):
        torch.testing.assert_close(torch.tensor(reply.data[0].embedding), vector, rtol=1e-5, atol=1e-6)


def test_numbers_and_base64_are_the_same(port: int) -> None:
    (_, plain), (_, packed) = asked(port), asked(port, encoding_format="base64", user="ada", dimensions=None)
    numbers = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    assert numbers.tolist() == np.array(plain["data"][0]["embedding"], np.float32).tolist()
    assert plain["object"] == "list"
    assert plain["model"] == "base"


def test_dimensions_are_the_first_numbers_and_queries_have_their_prompt(port: int, embedder: Embedder) -> None:
    vectors = expected(embedder, ["what is 1"])
    short = torch.tensor(asked(port, dimensions=8)[1]["data"][0]["embedding"])
    torch.testing.assert_close(short, vectors[0, :8])  # the folder has no Normalize
    query = torch.tensor(asked(port, prompt_name="query")[1]["data"][0]["embedding"])
    torch.testing.assert_close(query, expected(embedder, ["what is 1"], "query")[0])
    assert not torch.allclose(query, vectors[0])
    normal = Embedder(embedder.loaded, embedder.rows, type(embedder.loss)(embedder.loss.settings), 4)
    assert torch.equal(normal.shortened(vectors, 8), F.normalize(vectors[:, :8], dim=-1))


def test_a_run_is_served_next_to_its_base(folder: Path, embedder: Embedder, tmp_path: Path) -> None:
    rows = [{"query": f"what is {number}", "document": f"it is {number}"} for number in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe: dict[str, Any] = {
        "model": {"name_or_path": str(folder), "dtype": "float32"},
        "data": {"train": [{"path": "train.jsonl"}]},
        "adapter": {"method": "lora", "r": 4},
        "objective": {"method": "embed"},
        "training": {"learning_rate": 0.05, "max_steps": 2},
        "output": {"dir": "mine"},
    }
    run = train(write_sections(tmp_path, recipe, {}))
    loaded = load_target(find_target(str(run), None, []), torch.device("cpu"))
    tuned = make_embedder(loaded, 4)
    alone = expected(tuned, ["what is 1"])[0]
    desk = EmbeddingDesk(tuned, "mine")
    with running(make_server(desk, make_app(desk, None, 16))) as port:
        assert [model.id for model in client(port).models.list()] == ["base", "mine"]
        vectors = [
            torch.tensor(asked(port, model=name)[1]["data"][0]["embedding"]) for name in ("base", "mine", "base")
        ]
    assert torch.equal(vectors[0], vectors[2])
    torch.testing.assert_close(vectors[0], expected(embedder, ["what is 1"])[0])
    torch.testing.assert_close(vectors[1], alone)
    assert not torch.allclose(vectors[0], vectors[1], atol=1e-3)


WRONG_VALUES: list[tuple[str, list[Any]]] = [
    ("input", [None, "", " ", "\n", [], [[]], [""], ["a", ""], 5, 1.5, True, {}, {"text": "a"}, [1, 2], [[1, 2]]]),
    ("input", [["a", 5], ["a", None], ["a", ["b"]], ["a"] * 2049, "\ud800", "a\udfff", ["a", "\udc00"]]),
    ("dimensions", [0, -1, 33, 1e9, 1.5, "8", True, [8], {}]),
    ("encoding_format", ["", "FLOAT", "int8", 5, True, ["float"], {}, "base64 "]),
    ("prompt_name", ["", "Query", "passage", 5, True, ["query"], {}]),
    ("model", [None, "", "other", 5, ["base"], {}, "../base", "base\x00"]),
    ("user", [5, [], {}]),
    ("stream", [True]),
    ("messages", [[{"role": "user", "content": "x"}]]),
    ("truncate_dim", [8]),
]
WRONG_BODIES = [b"", b"null", b"[]", b"5", b'"a"', b"{", b"\xff", b"[" * 100_000, b'{"input": NaN}', b'{"input": "a"}x']


def test_hostile_requests_are_refused_by_name(port: int) -> None:
    wrong = [(field, value) for field, values in WRONG_VALUES for value in values]
    assert len(wrong) + len(WRONG_BODIES) >= 70
    for field, value in wrong:
        status, body = asked(port, **{field: value})
        assert status == (404 if field == "model" else 400), (field, value)
        assert body["error"]["param"] == field, (field, value)
        assert field in body["error"]["message"] or field == "input", body
    for raw in WRONG_BODIES:
        assert ask_raw(port, PATH, raw)[0] == 400, raw
    assert ask_raw(port, PATH, b"{}", JSON | {"Content-Type": "text/plain"})[0] == 415
    assert ask_raw(port, PATH, b" " * 4_000_001)[0] == 413
    assert ask_raw(port, PATH, None)[0] == 405
    status, reply = ask_raw(port, "/v1/chat/completions", b"{}")
    assert (status, b"needs one that writes texts: this server answers POST /v1/embeddings" in reply) == (404, True)
    assert asked(port)[0] == 200


def test_a_failure_of_the_server_has_its_status(port: int, embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*values: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Embedder, "embed", fail)
    status, body = asked(port)
    assert (status, body["error"]["message"]) == (500, "memory ran out")
    desk = EmbeddingDesk(embedder, "encoder")
    desk.stop()
    monkeypatch.undo()
    with running(make_server(desk, make_app(desk, None, 16))) as stopped:
        assert asked(stopped)[0] == 503


def test_a_client_that_left_is_not_answered_and_a_full_queue_is_said(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunekit.talking.embedding_desk.MAX_JOBS", 1)
    desk, question = EmbeddingDesk(embedder, "encoder"), EmbeddingQuestion("base", ("a",), "document", None, False)

    async def ask_twice() -> list[Any]:
        async def has_left() -> bool:
            await asyncio.sleep(0)
            return True

        return await asyncio.gather(*[desk.answer(question, has_left) for _ in range(2)], return_exceptions=True)

    left, refused = asyncio.run(ask_twice())
    assert (left.status, refused.status) == (400, 503)
    assert "the client left" in str(left)
    assert "1 requests are waiting" in str(refused)


def test_options_of_chats_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="embeds texts, so --adapter, --cache-memory and --adapter-memory"):
        serve_verb(str(folder), None, [], [], "127.0.0.1", 8000, None, 16, 4, ("1GiB", None))
