"""`tunekit serve` answers OpenAI's clients until it is stopped; every adapter is a model name over the one base.

GET /v1/models; POST /v1/chat/completions, streamed or whole.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tunekit.console import Console
from tunekit.errors import DataError, InputError, TunekitError
from tunekit.machine.devices import make_devices
from tunekit.machine.network import LOCAL_HOSTS, connection_limit, names_this_machine
from tunekit.talking.conversation import Reply, Speaker, add_folders, make_speaker, name_of
from tunekit.talking.desk import Desk, Job
from tunekit.talking.protocol import ChatRequest, ProtocolError, read_body, usage
from tunekit.targets.target import find_target, load_target

if TYPE_CHECKING:
    from types import FrameType

    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response, StreamingResponse
    from uvicorn import Server

AsgiApp = Callable[..., Awaitable[None]]  # (scope, receive, send) -> nothing
LARGEST_BODY_BYTES = 4_000_000
QUEUED_CONNECTIONS = 1024
HEADER_SECONDS, BODY_SECONDS = 10.0, 60.0  # within which a client sends them


async def whole_body(request: Request) -> bytes:
    """Raises: ProtocolError where it is too large, or said to be no JSON.

    A page from elsewhere can make the browser send a body here unasked, but none of this type.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ProtocolError(415, "the body must be JSON: send it with Content-Type: application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY_BYTES:
            raise ProtocolError(413, f"the body is larger than {LARGEST_BODY_BYTES:,} bytes")
    return bytes(body)


def make_app(desk: Desk, key: str | None, most_tokens: int, only_local: bool = True) -> Starlette:
    """The endpoint as an ASGI application. `key`: what clients must give; None: nothing. `only_local`: whether it is
    this machine's alone."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    names, began = desk.speaker.names, int(time.time())

    def refused(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect):
            error = ProtocolError(400, "the client left before its request was whole")
        elif isinstance(error, HTTPException):
            error = ProtocolError(error.status_code, str(error.detail))
        assert isinstance(error, ProtocolError)  # its text may quote half a surrogate pair, which json escapes
        return Response(json.dumps(error.body), error.status, media_type="application/json")

    def check(request: Request) -> None:
        """Who asks, and whom."""
        host = request.headers.get("host", "")
        if only_local and not names_this_machine(host):
            raise ProtocolError(403, f"{host!r} is not this machine: ask {' or '.join(LOCAL_HOSTS)}")
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        bears = scheme.lower() == "bearer"
        if key is not None and not (hmac.compare_digest(given.strip().encode(), key.encode()) and bears):
            raise ProtocolError(401, "the key is missing or wrong: Authorization: Bearer KEY", code="invalid_api_key")

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(request: Request) -> Response:
        check(request)
        each = [{"id": name, "object": "model", "created": began, "owned_by": "tunekit"} for name in names]
        return JSONResponse({"object": "list", "data": each})

    async def completions(request: Request) -> Response | AsgiApp:
        check(request)
        asked = read_body(await whole_body(request), names, most_tokens)
        talk = Talk(desk, asked)
        if not asked.stream:
            return JSONResponse(await talk.whole(request))
        await talk.begun(request)
        events = StreamingResponse(talk.pieces(), media_type="text/event-stream")
        return partial(talk.send, events)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/chat/completions", completions, methods=["POST"]),
        ],
        exception_handlers=dict.fromkeys((ProtocolError, HTTPException, ClientDisconnect), refused),
    )


class Talk:
    """One completion on its way from the desk's thread to its client."""

    def __init__(self, desk: Desk, asked: ChatRequest) -> None:
        self.asked = asked
        self.arrived: asyncio.Queue[str | Reply | Exception] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(what: str | Reply | Exception) -> None:
            loop.call_soon_threadsafe(self.arrived.put_nowait, what)

        self.job = Job(asked.request, asked.name, tell, tell, asked.seeded)
        self.facts = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.name}
        self._first: str | Reply | None = None
        desk.put(self.job)

    async def _next(self) -> str | Reply:
        """The next piece, or the reply at the end. Raises: ProtocolError."""
        found = await self.arrived.get()
        if isinstance(found, DataError):
            code = "context_length_exceeded" if "tokens" in str(found) else None
            raise ProtocolError(400, str(found), "messages", code)
        if isinstance(found, TunekitError):
            raise ProtocolError(400, str(found))
        if isinstance(found, Exception):
            raise ProtocolError(503 if isinstance(found, ConnectionError) else 500, str(found))
        return found

    async def whole(self, request: Request) -> dict[str, Any]:
        """The answer in one."""
        while not isinstance(found := await self._wanted(request), Reply):
            pass
        message = {"role": "assistant", "content": found.text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": found.reason}
        return {**self.facts, "object": "chat.completion", "choices": [choice], "usage": usage(found)}

    async def begun(self, request: Request) -> None:
        """Wait for the first piece, so that what is wrong with the request has its own status."""
        self._first = await self._wanted(request)

    async def _wanted(self, request: Request) -> str | Reply:
        """The next piece; the job is given up where the client is gone."""
        waiting = asyncio.ensure_future(self._next())
        while not (await asyncio.wait([waiting], timeout=1.0))[0]:
            if await request.is_disconnected():
                self.job.cancelled.set()
        return waiting.result()

    async def send(self, events: StreamingResponse, *of_asgi: object) -> None:
        """Send them; the job ends with its client, also with one that left before the first event."""
        try:
            await events(*of_asgi)
        finally:
            self.job.cancelled.set()

    async def pieces(self) -> AsyncIterator[str]:
        """Events of the protocol."""
        try:
            yield self._event({"role": "assistant", "content": ""}, None)
            found = self._first
            while isinstance(found, str):
                yield self._event({"content": found}, None)
                found = await self._next()
            assert isinstance(found, Reply)
            yield self._event({}, found.reason)
            if self.asked.with_usage:
                yield self._data({"choices": [], "usage": usage(found)})
        except ProtocolError as error:
            yield f"data: {json.dumps(error.body)}\n\n"
        yield "data: [DONE]\n\n"

    def _event(self, delta: dict[str, str], reason: str | None) -> str:
        return self._data({"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]})

    def _data(self, value: dict[str, Any]) -> str:
        return f"data: {json.dumps({**self.facts, 'object': 'chat.completion.chunk', **value})}\n\n"


def serve_verb(
    target: str,
    base: str | None,
    overrides: Sequence[str],
    adapters: Sequence[str],
    host: str,
    port: int,
    key: str | None,
    most_tokens: int,
    batch_size: int,
) -> None:
    """Serve until a signal. Raises: TunekitError, whose exit code the command line returns."""
    try:
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"serving needs {error.name}", "pip install 'tunekit[serve]'") from error
    key = key or os.environ.get("TUNEKIT_API_KEY")
    if host not in LOCAL_HOSTS and not key:
        how = "give --api-key or TUNEKIT_API_KEY, or leave --host out"
        raise InputError(f"on {host} others could use it without a key", how)
    console, found = Console(), find_target(target, base, overrides)
    listening = bind(host, port)
    console.warn(*found.rewrites)
    console.info(f"loading {found.model.name_or_path} ...")
    devices = make_devices()
    try:
        speaker = make_speaker(load_target(found, devices.device), name_of(target))
        add_folders(speaker, adapters)
        desk = Desk(speaker, batch_size)
        app = make_app(desk, key, most_tokens, only_local=host in LOCAL_HOSTS)
        server = make_server(desk, app)
        threading.Thread(target=_announce, args=(server, console, speaker, host, port), daemon=True).start()
        server.run(sockets=[listening])
        desk.close()
    finally:
        listening.close()
        devices.close()


def bind(host: str, port: int) -> socket.socket:
    """The socket to serve on, taken before a model is loaded. Raises: InputError where another program has it."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(f"{host}:{port} cannot be listened on ({error.strerror})", "choose another --port") from error


def make_server(desk: Desk, app: Starlette) -> Server:
    """A server that a signal ends at once: the answers that are being made are given up with it.

    It accepts few connections at a time, so that the request of each is read before many others come after it; these
    wait in the system's queue. Its log has no line for a bad request, of which anybody can send any number.
    """
    import uvicorn

    most = connection_limit()
    settings = {"http": make_connection_class(most), "ws": "none", "lifespan": "off", "loop": "asyncio"}
    server = uvicorn.Server(uvicorn.Config(app, **settings, backlog=most // 8, log_level="error"))
    end, start = server.handle_exit, server.startup

    def end_with_answers(signal: int, frame: FrameType | None) -> None:
        desk.stop()
        end(signal, frame)

    async def start_with_a_queue(sockets: Sequence[socket.socket]) -> None:
        await start(sockets)
        for listening in sockets:
            listening.listen(QUEUED_CONNECTIONS)  # the backlog above is both, the queue and how many are accepted

    server.handle_exit, server.startup = end_with_answers, start_with_a_queue
    return server


def make_connection_class(most: int) -> type[asyncio.Protocol]:
    """uvicorn's connection with deadlines for header and body, and a limit: of more than `most`, the one that has kept
    the server waiting for the longest time is closed. uvicorn itself waits for ever."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    deadlines: dict[Connection, asyncio.TimerHandle] = {}  # of those without a whole request, the oldest first

    class Connection(H11Protocol):  # type: ignore[misc]
        awaited_seconds: float | None = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.await_request()
            if len(self.connections) > most:
                next(iter(deadlines)).give_up()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.await_request()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.await_request()

        def connection_lost(self, error: Exception | None) -> None:
            self.stop_waiting()
            super().connection_lost(error)

        def shutdown(self) -> None:
            if self in deadlines:
                self.give_up()
            else:
                super().shutdown()

        def await_request(self) -> None:
            """Begin a deadline where what the client has to send next has changed; there is none while it waits."""
            idle = self.cycle is None or self.cycle.response_complete
            seconds = HEADER_SECONDS if idle else BODY_SECONDS if self.cycle.more_body else None
            if seconds != self.awaited_seconds:
                self.stop_waiting()
                self.awaited_seconds = seconds
                if seconds is not None:
                    deadlines[self] = self.loop.call_later(seconds, self.give_up)

        def stop_waiting(self) -> None:
            if self in deadlines:
                deadlines.pop(self).cancel()

        def give_up(self) -> None:
            self.stop_waiting()
            self.transport.abort()

    return Connection


def _announce(server: Server, console: Console, speaker: Speaker, host: str, port: int) -> None:
    """Say where it listens, once it does."""
    while not server.started:
        time.sleep(0.05)
    console.info(f"models: {', '.join(speaker.names)}", f"serving at http://{host}:{port}/v1 - Ctrl-C ends it")
