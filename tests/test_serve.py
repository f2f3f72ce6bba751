"""`tunekit serve` asked by the openai client: the answers of generate, the protocol's errors."""

from __future__ import annotations

import asyncio
import json
import queue
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch

from tests.talking.test_conversation import adapter_of
from tunekit.contracts import GREEDY
from tunekit.errors import InputError
from tunekit.generate import answer
from tunekit.serve import bind, make_app, make_server, serve_verb
from tunekit.talking.adapters import name_of
from tunekit.talking.answer import AnswerPiece
from tunekit.talking.completion import ClientAnswer
from tunekit.talking.conversation import make_speaker
from tunekit.talking.desk import Desk, Job
from tunekit.talking.protocol import ClientQuestion, ProtocolError, read_body
from tunekit.targets.target import find_target, load_target

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
CPU = torch.device("cpu")
QUESTIONS = [f"Say {word}, please." for word in ("something", "a longer thing about the sea", "yes", "it once more")]


@contextmanager
def serving(base: Path, adapters: Path, key: str | None = None) -> Iterator[int]:
    """The port of a server of the base and each adapter in the folder."""
    speaker = make_speaker(load_target(find_target(str(base), None, ["model.dtype=float32"]), CPU))
    speaker.adapters.add_folder(str(adapters))
    desk = Desk(speaker, 8, 512)
    with running(make_server(desk, make_app(desk, key, 16))) as port:
        yield port
    desk.close()


@contextmanager
def running(server: Any) -> Iterator[int]:
    """The port of a server that runs in a thread."""
    listening = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two")):
        adapter_of(tiny_llama, found / name, seed)
    return found


@pytest.fixture(scope="module")
def port(tiny_llama: Path, folders: Path) -> Iterator[int]:
    with serving(tiny_llama, folders) as found:
        yield found


def client(port: int, key: str = "none") -> Any:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)


JSON = {"Content-Type": "application/json"}


def ask_raw(port: int, path: str, body: bytes | None, headers: dict[str, str] = JSON) -> tuple[int, bytes]:
    """Status and body of an answer, whatever the status."""
    try:
        with urlopen(Request(f"http://127.0.0.1:{port}{path}", body, headers)) as reply:
            return reply.status, reply.read()
    except HTTPError as error:
        return error.code, error.read()


def ask(asked: Any, model: str, question: str, /, **more: Any) -> Any:
    messages = [{"role": "user", "content": question}]
    return asked.chat.completions.create(**{"model": model, "messages": messages, "temperature": 0, **more})


def expected(tiny_llama: Path, folders: Path, questions: list[str]) -> dict[str, list[str]]:
    """Of each model name what `tunekit generate` answers."""
    settings = ["model.dtype=float32", "evaluation.max_new_tokens=16"]
    targets = {"base": tiny_llama, "one": folders / "one", "two": folders / "two"}
    return {
        name: answer(load_target(find_target(str(target), None, settings), CPU), questions)
        for name, target in targets.items()
    }


@pytest.mark.drawn
def test_clients_get_what_generate_answers(port: int, tiny_llama: Path, folders: Path) -> None:
    asked, answers = client(port), expected(tiny_llama, folders, QUESTIONS)
    assert [model.id for model in asked.models.list()] == ["base", "one", "two"]
    jobs = [(name, at) for name in answers for at in range(len(QUESTIONS))]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda job: ask(asked, job[0], QUESTIONS[job[1]]), jobs))
    for (name, at), reply in zip(jobs, replies, strict=True):
        assert reply.choices[0].message.content == answers[name][at]
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    stream = ask(asked, "one", QUESTIONS[0], stream=True, stream_options={"include_usage": True})
    events = list(stream)
    assert "".join(event.choices[0].delta.content or "" for event in events if event.choices) == answers["one"][0]
    assert events[-1].usage.completion_tokens == replies[jobs.index(("one", 0))].usage.completion_tokens
    assert ask(asked, "one", QUESTIONS[0], max_tokens=3).choices[0].finish_reason == "length"
    drawn = [
        ask(asked, "one", QUESTIONS[0], temperature=1.5, seed=seed).choices[0].message.content for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        ({"model": "three"}, 404, "there is no model 'three'"),
        ({"temperature": 3}, 400, "'temperature' must be a number"),
        ({"max_tokens": 0}, 400, "'max_tokens' must be a number"),
        ({"n": 200}, 400, "'n' must be a number from 1 to 128"),
        ({"top_logprobs": 2}, 400, "'top_logprobs' needs 'logprobs'"),
        ({"extra_body": {"modalities": ["audio"]}}, 400, "'modalities' is not supported"),
        ({"response_format": {"type": "json_schema"}}, 400, "json_schema with a schema"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "'tools' is not supported: the chat"),
        ({"tools": [{"type": "function"}]}, 400, "a tool needs a function with a name"),
        ({"tool_choice": "required"}, 400, "'tool_choice' must be none, auto, required or"),
        ({"extra_body": {"top_z": 1}}, 400, "'top_z' is not a known field"),
        ({"messages": []}, 400, "one message or more"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, "needs a role"),
        ({"messages": [{"role": "user", "content": "x" * 900}]}, 400, "reads at most 512"),
        ({"messages": [{"role": "user", "content": "x" * 900}], "stream": True}, 400, "reads at most 512"),
        ({"stop": [""]}, 400, "'stop' must be"),
        ({"stop": "x" * 2000}, 400, "each with 1 to 1000 characters"),
        ({"extra_body": {"stream_options": [1]}}, 400, "'stream_options' must be an object"),
        ({"extra_body": {"stream": "yes"}}, 400, "'stream' must be true or false"),
        ({"messages": [{"role": "assistant", "tool_calls": "x"}]}, 400, "messages.0.tool_calls"),
    ],
)
def test_what_is_wrong_is_said_in_the_protocols_form(port: int, more: dict[str, Any], status: int, said: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client(port), "one", "x", **more)
    assert caught.value.status_code == status
    assert said in caught.value.body["message"]


def test_only_a_text_that_is_too_long_has_the_code_of_its_length(port: int) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client(port), "one", "x" * 900)
    assert refused.value.code == "context_length_exceeded"


def test_bad_bodies_and_keys(port: int, tiny_llama: Path, folders: Path) -> None:
    for body in (b'{"model": ', b"[]", b"\xff", b"[" * 100_000, b"x" * 5_000_000):
        status, reply = ask_raw(port, "/v1/chat/completions", body)
        assert status == (413 if len(body) > 4_000_000 else 400)
        assert json.loads(reply)["error"]["message"]
    assert b"is not a known field" in ask_raw(port, "/v1/chat/completions", b'{"\\ud800": 1}')[1]
    for path, sent, code, words in (
        ("/nothing", None, 404, "there is no /nothing: this server answers POST /v1/chat/completions, POST /v1/co"),
        (
            "/v1/embeddings",
            b"{}",
            404,
            "the served model writes texts, and /v1/embeddings needs one that gives embeddings: ",
        ),
        ("/v1/completions", None, 405, "/v1/completions does not answer GET: this server answers POST"),
    ):
        status, reply = ask_raw(port, path, sent)
        assert (status, words in json.loads(reply)["error"]["message"]) == (code, True)
    status, reply = ask_raw(port, "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "Hi"}]}')
    assert (status, b"'model' is required; there are: " in reply) == (404, True)
    with serving(tiny_llama, folders, key="secret") as kept:
        with pytest.raises(openai.AuthenticationError):
            client(kept, "wrong").models.list()
        assert ask(client(kept, "secret"), "base", "x").choices


class Names:
    """The adapters of a server that has one model."""

    names: ClassVar[list[str]] = ["one"]
    listing = "one"

    def knows(self, name: str) -> bool:
        return name in self.names

    def read_folders(self) -> None:
        pass


class Slow:
    """A speaker that begins when it is let go, and whose answers never end; the seeds of its requests."""

    def __init__(self) -> None:
        self.free, self.seeds, self.adapters = threading.Event(), list[int](), Names()
        self.running: dict[int, Any] = {}

    def prepare(self, request: Any, name: str) -> Any:
        return replace(request, prompt=[1])

    @contextmanager
    def answering(self, slots: int, tokens: int) -> Iterator[Any]:
        self.slots = slots
        yield self

    @property
    def free_slots(self) -> int:
        return self.slots - len(self.running)

    def put(self, request: Any, name: str, on_piece: Any, on_end: Any) -> int:
        self.seeds.append(request.sampling.seed)
        self.running[len(self.seeds)] = on_piece, on_end
        return len(self.seeds)

    def step(self) -> None:
        self.free.wait(10)
        time.sleep(0.001)
        for on_piece, _ in list(self.running.values()):
            on_piece(AnswerPiece("x"))

    def cancel(self, handle: int) -> None:
        del self.running[handle]


BODY = {"model": "one", "messages": [{"role": "user", "content": "x"}]}


def body_of(**more: Any) -> ClientQuestion:
    names: Any = Names()
    return read_body(json.dumps(BODY | more).encode(), names, 4)


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"stream_options": {"include_usage": "x"}}, "stream_options.include_usage"),
        ({"stream_options": {"usage": True}}, "stream_options.usage"),
        ({"metadata": "x"}, "metadata"),
        ({"store": 1}, "store"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_p": "0.1"}, "min_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "5"),
        ({"logit_bias": [5]}, "logit_bias"),
    ],
)
def test_wrong_values_of_clients_are_refused(more: dict[str, Any], field: str) -> None:
    with pytest.raises(ProtocolError) as refused:
        body_of(**more)
    assert (refused.value.status, refused.value.body["error"]["param"]) == (400, field)


def test_bodies_that_are_not_json_and_mixed_prompts_are_refused() -> None:
    names: Any = Names()
    for body in ('{"model": "one", "metadata": NaN}', '{"model": "one", "prompt": ["a", [5]], "max_tokens": 1}'):
        with pytest.raises(ProtocolError) as refused:
            read_body(body.encode(), names, 4, is_chat=False)
        assert refused.value.status == 400


def test_penalties_of_clients_are_read() -> None:
    penalties = {"min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": -1, "frequency_penalty": 0.5}
    (request,) = body_of(**penalties, top_k=-1, logit_bias={"5": -100, "7": 2.5}, temperature=0).requests
    sampling = request.sampling
    assert {name: getattr(sampling, name) for name in penalties} == penalties
    assert (sampling.logit_bias, sampling.top_k, sampling.temperature) == (((5, -100.0), (7, 2.5)), 0, 0.0)
    assert body_of(presence_penalty=0, temperature=0).requests[0].sampling == GREEDY


class Client:
    """A client that reads what it is sent; it leaves when it is let go."""

    def __init__(self) -> None:
        self.leaves, self.sent = asyncio.Event(), list[Any]()

    async def receive(self) -> Any:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(stream: bool) -> None:
    """Also one that leaves while it waits for a slot. The client after it is answered."""

    async def leave() -> None:
        speaker: Any = Slow()
        desk, clients = Desk(speaker, 1, 9), [Client(), Client(), Client()]
        talks = [ClientAnswer(desk, body_of(stream=stream or client is clients[2])) for client in clients]
        tasks = [
            asyncio.ensure_future(talk({}, client.receive, client.send))
            for talk, client in zip(talks, clients, strict=True)
        ]
        speaker.free.set()
        while not speaker.seeds:
            await asyncio.sleep(0.01)
        for place in (1, 0):
            clients[place].leaves.set()
            await asyncio.gather(tasks[place], return_exceptions=True)
        while len(clients[2].sent) < 3:
            await asyncio.sleep(0.01)
        assert len(speaker.seeds) == 2
        clients[2].leaves.set()
        await tasks[2]
        await asyncio.to_thread(desk.close)
        assert speaker.running == {}

    asyncio.run(asyncio.wait_for(leave(), 60))


def test_an_error_before_the_first_piece_has_a_status() -> None:
    """Afterwards it is an event of the stream."""

    async def fail() -> None:
        speaker: Any = Slow()
        desk, client = Desk(speaker, 1, 9), Client()
        desk.stop()
        with pytest.raises(ProtocolError, match="shutting down"):
            await ClientAnswer(desk, body_of(stream=True))({}, client.receive, client.send)
        assert client.sent == []
        await asyncio.to_thread(desk.close)

    asyncio.run(asyncio.wait_for(fail(), 60))


def test_only_a_seed_that_was_asked_for_repeats_itself() -> None:
    """Choices of one request have different seeds, and the first one draws as a single choice does."""
    speaker: Any = Slow()
    speaker.free.set()
    desk, ended = Desk(speaker, 8, 9), queue.SimpleQueue[Any]()
    for more in ({}, {}, {"seed": 7}, {"seed": 7, "n": 3}):
        asked = body_of(**more)
        for request in asked.requests:
            job = Job(request, "one", lambda text: None, ended.put, asked.seeded)
            job.on_piece = lambda piece, job=job: job.cancelled.set()  # type: ignore[misc]
            desk.put([job])
            ended.get(timeout=10)
    desk.close()
    assert speaker.seeds[2] == speaker.seeds[3] == 7
    assert len(set(speaker.seeds)) == 5


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunekit.serve.load_target", lambda *given: pytest.fail("loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="cannot listen on"):
            serve_verb(str(tiny_llama), None, [], [], "127.0.0.1", taken.getsockname()[1], None, 16, 8)


def test_a_run_is_served_under_its_name() -> None:
    assert [name_of(each) for each in ("runs/a", "runs/a/adapter", "runs/a@120", "org/b")] == ["a", "a", "a@120", "b"]
    assert name_of(".") == Path.cwd().name


def test_elsewhere_than_here_a_key_is_needed(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUNEKIT_API_KEY", raising=False)
    with pytest.raises(InputError, match="without a key"):
        serve_verb(str(tiny_llama), None, [], [], "0.0.0.0", 8000, None, 16, 8)


def test_a_folder_without_adapters_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    speaker = make_speaker(load_target(find_target(str(tiny_llama), None, []), CPU))
    with pytest.raises(InputError, match="contains no adapter"):
        speaker.adapters.add_folder(str(tmp_path))


@pytest.mark.slow
def test_two_hundred_requests_of_eight_clients(tiny_llama: Path, folders: Path) -> None:
    """Stopped and started again in between."""
    questions = [f"{question} {number}" for number in range(25) for question in QUESTIONS[:1]]
    answers = expected(tiny_llama, folders, questions)
    jobs = [(name, at) for at in range(len(questions)) for name in ("base", "one", "two", "one")]
    for _ in range(2):
        with serving(tiny_llama, folders) as port, ThreadPoolExecutor(8) as pool:
            asked = client(port)
            replies = list(pool.map(lambda job: ask(asked, job[0], questions[job[1]]), jobs))  # noqa: B023
        wrong = [
            job
            for job, reply in zip(jobs, replies, strict=True)
            if reply.choices[0].message.content != answers[job[0]][job[1]]
        ]
        assert wrong == []


def test_a_signal_ends_the_answers_that_are_being_made() -> None:
    """Streams end with the protocol's error, and the server is gone in no time; without the stop it would wait."""
    speaker: Any = Slow()
    speaker.free.set()
    desk = Desk(speaker, 8, 9)
    server, body = make_server(desk, make_app(desk, None, 4)), json.dumps(BODY | {"stream": True}).encode()
    with (
        running(server) as port,
        urlopen(Request(f"http://127.0.0.1:{port}/v1/chat/completions", body, JSON)) as reply,
    ):
        reply.readline()
        server.handle_exit(2, None)
        lines = [line for line in reply.read().decode().split("\n\n") if line]
    assert "the server is shutting down" in lines[-2]
    assert lines[-1] == "data: [DONE]"
    desk.close()
