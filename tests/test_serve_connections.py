"""What strangers send to `tunekit serve`: connections that never become requests, other hosts' names, wrong types."""

from __future__ import annotations

import json
import logging
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

from tests.test_serve import BODY, JSON, Names, Slow, ask_raw, running
from tunekit import serve
from tunekit.serve import bind, make_app, make_server
from tunekit.talking import desk as desk_module
from tunekit.talking.answer import AnswerPiece, Reply
from tunekit.talking.desk import Desk, Job
from tunekit.talking.protocol import read_body

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
HALVES = (b"", HEAD, HEAD + b"Content-Length: 1000\r\n\r\n{")  # nothing, half a header, half a body
PLACE = "/v1/chat/completions"


class Patient(Slow):
    """A speaker that ends its answers when it is let go; `reading`: what it waits for before it reads `wait`."""

    def __init__(self, free: bool = True) -> None:
        super().__init__()
        self.reading = threading.Event()
        if free:
            self.free.set()

    def prepare(self, request: Any, name: str) -> Any:
        if request.messages[0].content == "wait":
            self.reading.wait(10)
        return super().prepare(request, name)

    def step(self) -> None:
        self.free.wait(10)
        for handle in list(self.running):
            self.running.pop(handle)[1](Reply("x", 1, 1, "stop"))


@contextmanager
def serving(speaker: Any, key: str | None = None) -> Iterator[int]:
    desk = Desk(speaker, 8, 9)
    with running(make_server(desk, make_app(desk, key, 4))) as port:
        yield port
    desk.close()


def half_open(port: int, at: int) -> socket.socket:
    """A connection that sends the beginning of a request. Raises: OSError where it is refused."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    with suppress(OSError):
        connection.sendall(HALVES[at % len(HALVES)])
    return connection


def answers(port: int) -> bool:
    with suppress(URLError, OSError):
        return ask_raw(port, PLACE, json.dumps(BODY).encode())[0] == 200
    return False


def test_half_open_connections_make_room(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """300 under a limit of 40: it answers all the time, keeps 40 of them at most, and logs nothing."""
    monkeypatch.setattr(serve, "connection_limit", lambda: 40)
    made: list[Any] = []
    monkeypatch.setattr("uvicorn.Server", kept(made))
    with caplog.at_level(logging.WARNING), serving(Patient()) as port, ExitStack() as held:
        for at in range(300):
            held.enter_context(half_open(port, at))
            assert at % 50 or answers(port)
        assert answers(port)
        assert len(made[0].server_state.connections) <= 41
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def kept(made: list[Any]) -> Any:
    """uvicorn's Server, of which each one made is kept."""
    import uvicorn

    class Kept(uvicorn.Server):  # type: ignore[misc]
        def __init__(self, *of_server: Any) -> None:
            super().__init__(*of_server)
            made.append(self)

    return Kept


def test_header_and_body_have_deadlines_and_answers_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer takes longer than both."""
    monkeypatch.setattr(serve, "HEADER_SECONDS", 0.1)
    monkeypatch.setattr(serve, "BODY_SECONDS", 0.2)
    speaker, answered = Patient(free=False), list[tuple[int, bytes]]()
    with serving(speaker) as port:
        body = json.dumps(BODY).encode()
        asking = threading.Thread(target=lambda: answered.append(ask_raw(port, PLACE, body)))
        asking.start()
        for at in range(len(HALVES)):
            with half_open(port, at) as connection, suppress(ConnectionResetError):
                assert connection.recv(100) == b""  # else TimeoutError, after 10 seconds
        speaker.free.set()
        asking.join(10)
    assert [status for status, _ in answered] == [200]


def test_a_client_that_does_not_read_its_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "READING_SECONDS", 0.2)

    class Long(Patient):
        def step(self) -> None:
            for on_piece, _ in list(self.running.values()):
                on_piece(AnswerPiece("x" * 1_000_000))
            time.sleep(0.01)

        def cancel(self, handle: int) -> None:
            super().cancel(handle)
            left.set()

    left, body = threading.Event(), json.dumps(BODY | {"stream": True}).encode()
    with serving(Long()) as port, half_open(port, 0) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert left.wait(30)


@pytest.mark.parametrize(
    ("headers", "status", "said"),
    [
        ({"Host": "elsewhere.example"}, 403, "'elsewhere.example' is not this machine"),
        ({"Host": "127.0.0.1.elsewhere.example:80"}, 403, "is not this machine"),
        ({"Host": "LocalHost:1"}, 200, ""),
        ({"Host": "[::1]:8000"}, 200, ""),
        ({"Content-Type": "text/plain"}, 415, "send it with Content-Type: application/json"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415, "application/json"),
        ({"Content-Type": "Application/JSON; charset=utf-8"}, 200, ""),
        ({"Authorization": "bearer secret"}, 200, ""),
        ({"Authorization": "BEARER  secret"}, 200, ""),
        ({"Authorization": "secret"}, 401, "Authorization: Bearer KEY"),
        ({"Authorization": "Basic secret"}, 401, "Authorization: Bearer KEY"),
        ({"Authorization": "Bearer wrong"}, 401, "Authorization: Bearer KEY"),
        ({"Authorization": "Bearer secr\u00e9t"}, 401, "Authorization: Bearer KEY"),
    ],
)
def test_headers_are_checked(shared_port: int, headers: dict[str, str], status: int, said: str) -> None:
    sent = JSON | {"Authorization": "Bearer secret"} | headers
    found, reply = ask_raw(shared_port, PLACE, json.dumps(BODY).encode(), sent)
    assert (found, said in reply.decode()) == (status, True)


def test_a_client_that_leaves_stops_its_answer() -> None:
    speaker: Any = Slow()
    speaker.free.set()
    with serving(speaker) as port:
        body = json.dumps(BODY | {"stream": True}).encode()
        with urlopen(Request(f"http://127.0.0.1:{port}{PLACE}", body, JSON)) as reply:
            reply.readline()
            assert speaker.running
        ends = time.monotonic() + 10
        while speaker.running and time.monotonic() < ends:
            time.sleep(0.01)
        assert speaker.running == {}


@pytest.fixture(scope="module")
def shared_port() -> Iterator[int]:
    with serving(Patient(), key="secret") as port:
        yield port


def test_a_server_that_others_reach_is_asked_by_any_name() -> None:
    desk: Any = Desk(Patient(), 8, 9)  # type: ignore[arg-type]
    with running(make_server(desk, make_app(desk, "secret", 4, only_local=False))) as port:
        headers = JSON | {"Authorization": "Bearer secret", "Host": "models.example"}
        assert ask_raw(port, PLACE, json.dumps(BODY).encode(), headers)[0] == 200
    desk.close()


def ended(desk: Desk, content: str = "x", **more: Any) -> queue.SimpleQueue[Any]:
    """What a job ends with."""
    body = {**BODY, "messages": [{"role": "user", "content": content}], **more}
    names: Any = Names()
    asked, found = read_body(json.dumps(body).encode(), names, 4), queue.SimpleQueue[Any]()
    desk.put([Job(asked.requests[0], "one", lambda piece: None, found.put)])
    return found


def test_a_prompt_that_is_read_holds_up_no_answer() -> None:
    speaker: Any = Patient(free=False)
    desk = Desk(speaker, 8, 9)
    first, second = ended(desk), ended(desk, "wait")
    speaker.free.set()
    assert first.get(timeout=10) == Reply("x", 1, 1, "stop")
    assert second.empty()
    speaker.reading.set()
    assert second.get(timeout=10) == Reply("x", 1, 1, "stop")
    desk.close()


def test_one_request_too_many_is_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk_module, "MAX_JOBS", 2)
    speaker: Any = Patient(free=False)
    desk = Desk(speaker, 8, 9)
    waiting = [ended(desk) for _ in range(3)]
    assert "2 requests are waiting already" in str(waiting[2].get(timeout=10))
    speaker.free.set()
    assert [each.get(timeout=10).reason for each in waiting[:2]] == ["stop", "stop"]
    assert ended(desk).get(timeout=10).reason == "stop"
    desk.close()


def listen_to_ctrl_c() -> None:
    """In the child: a process in the background of a script inherits that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_ten_thousand_half_open_connections_under_1024_files(tiny_llama: Path, tmp_path: Path) -> None:
    """The command itself: it answers all the time, ends by a signal, and its log is a few lines."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 11_000:
        pytest.skip("this machine does not let the test open 10,000 connections")
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    command = f"ulimit -n 1024; exec {sys.executable} -m tunekit serve {tiny_llama} --port {port} model.dtype=float32"
    body = json.dumps({"model": "base", "messages": BODY["messages"], "max_tokens": 2}).encode()
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 20_000), hard))
    statuses: list[int] = []
    with (tmp_path / "log").open("wb") as log, ExitStack() as held, ThreadPoolExecutor(8) as strangers:
        server = subprocess.Popen(["bash", "-c", command], stdout=log, stderr=log, preexec_fn=listen_to_ctrl_c)
        try:
            while not statuses:
                assert server.poll() is None
                with suppress(URLError):
                    statuses.append(ask_raw(port, PLACE, body)[0])
            attack = [strangers.submit(half_open, port, at) for at in range(10_000)]
            while not all(connection.done() for connection in attack):
                statuses.append(ask_raw(port, PLACE, body)[0])
            for connection in attack:
                held.enter_context(connection.result())
            statuses += [ask_raw(port, PLACE, body)[0] for _ in range(5)]
            server.send_signal(signal.SIGINT)
            assert server.wait(30) == 130
        finally:
            server.kill()
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert set(statuses) == {200}
    assert (tmp_path / "log").stat().st_size < 100_000
