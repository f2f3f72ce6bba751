"""`tunekit serve`: serves a model to OpenAI clients until it is stopped. Each adapter of the base is a model name.

GET /v1/models; POST /v1/chat/completions, streamed or complete.
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
MAX_BODY_BYTES = 4_000_000
QUEUED_CONNECTIONS = 1024
HEADER_SECONDS, BODY_SECONDS = 10.0, 60.0  # time limits for a client to send a request's header and body


async def read_request(request: Request) -> bytes:
    """The body of a request. Raises: ProtocolError if the body is too large or not declared as JSON.

    A foreign web page can make a browser send requests to this server, but not with this content type.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ProtocolError(415, "the body must be JSON: send it with Content-Type: application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise ProtocolError(413, f"the body is larger than {MAX_BODY_BYTES:,} bytes")
    return bytes(body)


def make_app(desk: Desk, key: str | None, max_tokens: int, only_local: bool = True) -> Starlette:
    """The endpoint as an ASGI application. `key`: the API key that clients must send; None: no key. `only_local`:
    whether only this machine can reach it."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    names, started = desk.speaker.names, int(time.time())

    def error_response(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect):
            error = ProtocolError(400, "the client left before its request was complete")
        elif isinstance(error, HTTPException):
            error = ProtocolError(error.status_code, str(error.detail))
        assert isinstance(error, ProtocolError)  # its text may contain an unpaired surrogate, which json escapes
        return Response(json.dumps(error.body), error.status, media_type="application/json")

    def check(request: Request) -> None:
        """Check the Host header and the API key."""
        host = request.headers.get("host", "")
        if only_local and not names_this_machine(host):
            raise ProtocolError(403, f"{host!r} is not this machine: use {' or '.join(LOCAL_HOSTS)}")
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        is_bearer = scheme.lower() == "bearer"
        if key is not None and not (hmac.compare_digest(token.strip().encode(), key.encode()) and is_bearer):
            raise ProtocolError(
                401, "the API key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key"
            )

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(request: Request) -> Response:
        check(request)
        entries = [{"id": name, "object": "model", "created": started, "owned_by": "tunekit"} for name in names]
        return JSONResponse({"object": "list", "data": entries})

    async def completions(request: Request) -> Response | AsgiApp:
        check(request)
        chat_request = read_body(await read_request(request), names, max_tokens)
        completion = Generation(desk, chat_request)
        if not chat_request.stream:
            return JSONResponse(await completion.result(request))
        await completion.wait_for_text(request)
        events = StreamingResponse(completion.events(), media_type="text/event-stream")
        return partial(completion.send, events)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/chat/completions", completions, methods=["POST"]),
        ],
        exception_handlers=dict.fromkeys((ProtocolError, HTTPException, ClientDisconnect), error_response),
    )


class Generation:
    """One completion, passed from the desk's thread to the client."""

    def __init__(self, desk: Desk, chat_request: ChatRequest) -> None:
        self.chat_request = chat_request
        self.arrived: asyncio.Queue[str | Reply | Exception] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(item: str | Reply | Exception) -> None:
            loop.call_soon_threadsafe(self.arrived.put_nowait, item)

        self.job = Job(chat_request.request, chat_request.name, deliver, deliver, chat_request.seeded)
        self.facts = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": chat_request.name}
        self._first: str | Reply | None = None
        desk.put(self.job)

    async def _next(self) -> str | Reply:
        """The next piece of text, or the reply at the end. Raises: ProtocolError."""
        item = await self.arrived.get()
        if isinstance(item, DataError):
            code = "context_length_exceeded" if "tokens" in str(item) else None
            raise ProtocolError(400, str(item), "messages", code)
        if isinstance(item, TunekitError):
            raise ProtocolError(400, str(item))
        if isinstance(item, Exception):
            raise ProtocolError(503 if isinstance(item, ConnectionError) else 500, str(item))
        return item

    async def result(self, request: Request) -> dict[str, Any]:
        """The complete answer."""
        while not isinstance(reply := await self._next_for(request), Reply):
            pass
        message = {"role": "assistant", "content": reply.text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reply.reason}
        return {**self.facts, "object": "chat.completion", "choices": [choice], "usage": usage(reply)}

    async def wait_for_text(self, request: Request) -> None:
        """Wait for the first piece of text, because an HTTP status cannot report an error after it."""
        self._first = await self._next_for(request)

    async def _next_for(self, request: Request) -> str | Reply:
        """The next piece of text; cancels the job if the client is gone."""
        waiting = asyncio.ensure_future(self._next())
        while not (await asyncio.wait([waiting], timeout=1.0))[0]:
            if await request.is_disconnected():
                self.job.cancelled.set()
        return waiting.result()

    async def send(self, events: StreamingResponse, *of_asgi: object) -> None:
        """Send the events; the job ends when its client leaves, even before the first event."""
        try:
            await events(*of_asgi)
        finally:
            self.job.cancelled.set()

    async def events(self) -> AsyncIterator[str]:
        """The answer as events of the protocol."""
        try:
            yield self._event({"role": "assistant", "content": ""}, None)
            item = self._first
            while isinstance(item, str):
                yield self._event({"content": item}, None)
                item = await self._next()
            assert isinstance(item, Reply)
            yield self._event({}, item.reason)
            if self.chat_request.with_usage:
                yield self._data({"choices": [], "usage": usage(item)})
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
    max_tokens: int,
    batch_size: int,
) -> None:
    """Serve until a stop signal arrives. Raises: TunekitError; the command line returns its exit code."""
    try:
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"serving needs {error.name}", "pip install 'tunekit[serve]'") from error
    key = key or os.environ.get("TUNEKIT_API_KEY")
    if host not in LOCAL_HOSTS and not key:
        how = "set --api-key or TUNEKIT_API_KEY, or remove --host"
        raise InputError(f"on {host} other machines could use the server without a key", how)
    console, spec = Console(), find_target(target, base, overrides)
    listening = bind(host, port)
    console.warn(*spec.rewrites)
    console.info(f"loading {spec.model.name_or_path} ...")
    devices = make_devices()
    try:
        speaker = make_speaker(load_target(spec, devices.device), name_of(target))
        add_folders(speaker, adapters)
        desk = Desk(speaker, batch_size)
        app = make_app(desk, key, max_tokens, only_local=host in LOCAL_HOSTS)
        server = make_server(desk, app)
        threading.Thread(target=_announce, args=(server, console, speaker, host, port), daemon=True).start()
        server.run(sockets=[listening])
        desk.close()
    finally:
        listening.close()
        devices.close()


def bind(host: str, port: int) -> socket.socket:
    """The socket to serve on, bound before a model is loaded. Raises: InputError if another program uses the port."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(f"{host}:{port} cannot be listened on ({error.strerror})", "choose another --port") from error


def make_server(desk: Desk, app: Starlette) -> Server:
    """A server that ends at once on a signal and aborts running answers.

    It accepts few connections at a time, so that it can read each request before many others arrive. The others wait in
    the system's queue. Bad requests are not logged, because a client could fill the log with them.
    """
    import uvicorn

    limit = connection_limit()
    settings = {"http": make_connection_class(limit), "ws": "none", "lifespan": "off", "loop": "asyncio"}
    server = uvicorn.Server(uvicorn.Config(app, **settings, backlog=limit // 8, log_level="error"))
    end, start = server.handle_exit, server.startup

    def end_with_answers(signal: int, frame: FrameType | None) -> None:
        desk.stop()
        end(signal, frame)

    async def start_with_a_queue(sockets: Sequence[socket.socket]) -> None:
        await start(sockets)
        for listening in sockets:
            listening.listen(QUEUED_CONNECTIONS)  # the backlog above limits both the queue and accepted connections

    server.handle_exit, server.startup = end_with_answers, start_with_a_queue
    return server


def make_connection_class(limit: int) -> type[asyncio.Protocol]:
    """uvicorn's connection class with deadlines for header and body, and with a limit: beyond `limit` connections, the
    one that has kept the server waiting longest is closed. uvicorn itself waits forever."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    deadlines: dict[Connection, asyncio.TimerHandle] = {}  # of connections without a complete request, the oldest first

    class Connection(H11Protocol):  # type: ignore[misc]
        awaited_seconds: float | None = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.await_request()
            if len(self.connections) > limit:
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
            """Start a deadline if the server now waits for the client to send a header or a body."""
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
    """Print the address, once the server listens."""
    while not server.started:
        time.sleep(0.05)
    console.info(f"models: {', '.join(speaker.names)}", f"serving at http://{host}:{port}/v1 - Ctrl-C ends it")
