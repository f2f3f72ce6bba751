"""`tunekit serve`: serves a model to OpenAI clients until it is stopped. Each adapter of the base is a model name.

GET /v1/models and /v1/models/NAME; POST /v1/chat/completions and /v1/completions, streamed or complete. For embedding
models: POST /v1/embeddings. For rerankers: POST /rerank and /score.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING

from tunekit.basics import bytes_text
from tunekit.console import Console
from tunekit.errors import InputError
from tunekit.machine.devices import make_devices
from tunekit.machine.memory import available_bytes
from tunekit.machine.network import LOCAL_HOSTS, connection_limit, names_this_machine
from tunekit.machine.versions import needed
from tunekit.model.families import make_family
from tunekit.recipe.memory import size_bytes
from tunekit.talking.adapters import Adapters, check_folder, name_of
from tunekit.talking.completion import ClientAnswer
from tunekit.talking.conversation import Speaker, make_speaker
from tunekit.talking.desk import Desk
from tunekit.talking.embedder import make_embedder
from tunekit.talking.embedding_desk import EmbeddingDesk
from tunekit.talking.protocol import ProtocolError, model_name, read_body, read_embedding_body
from tunekit.talking.reranking import RerankDesk, is_reranker, make_reranker, read_rerank_body, read_score_body
from tunekit.targets.system_message import trained_system
from tunekit.targets.target import family_of, find_target, load_target

if TYPE_CHECKING:
    from types import FrameType

    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from uvicorn import Server

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
RERANK, SCORE = ("/rerank", "/v1/rerank"), ("/score", "/v1/score")
OF_CHATS = "--adapter, --cache-memory and --adapter-memory"
MAX_BODY_BYTES = 4_000_000
MIN_TOKENS = 32  # a slot with fewer tokens has no room for a question and its answer
QUEUED_CONNECTIONS = 1024
HEADER_SECONDS, BODY_SECONDS = 10.0, 60.0  # time limits for a client to send a request's header and body
READING_SECONDS = 300.0  # time limit for a client to read the part of its answer that was sent


AnyDesk = Desk | EmbeddingDesk | RerankDesk
DOES = {Desk: "writes texts", EmbeddingDesk: "gives embeddings", RerankDesk: "scores pairs of texts"}
PATHS = {Desk: (CHAT, COMPLETIONS), EmbeddingDesk: (EMBEDDINGS,), RerankDesk: (*RERANK, *SCORE)}


async def read_request(request: Request) -> bytes:
    """The body of a request. Raises: ProtocolError if the body is too large, or its content type is not JSON.

    A foreign web page can make a browser send requests to this server, but not with the content type of JSON.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ProtocolError(415, "the body must be JSON: send it with Content-Type: application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise ProtocolError(413, f"the body is larger than {MAX_BODY_BYTES:,} bytes")
    return bytes(body)


def model_entry(name: str, created: int) -> dict[str, object]:
    """The entry of a model in the list of models. `created`: seconds since 1970."""
    return {"id": name, "object": "model", "created": created, "owned_by": "tunekit"}


def make_app(desk: AnyDesk, key: str | None, max_tokens: int, only_local: bool = True) -> Starlette:
    """The HTTP server as an ASGI application. `key`: the API key that clients must send; None: no key. `only_local`:
    whether only this machine can reach the server."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    adapters, started = desk.adapters, int(time.time())

    def error_response(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect):
            error = ProtocolError(400, "the client left before its request was complete")
        elif isinstance(error, HTTPException):
            error = ProtocolError(error.status_code, _wrong_path(request, error.status_code, desk))
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
        adapters.read_folders()
        return JSONResponse({"object": "list", "data": [model_entry(name, started) for name in adapters.names]})

    async def model(request: Request) -> Response:
        check(request)
        return JSONResponse(model_entry(model_name(request.path_params["name"], adapters), started))

    async def answer(request: Request) -> ClientAnswer | Response:
        check(request)
        body = await read_request(request)
        if isinstance(desk, Desk):
            return ClientAnswer(desk, read_body(body, adapters, max_tokens, is_chat=request.url.path == CHAT))
        return Response(await _answer_in_turn(desk, request, body), media_type="application/json")

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{name}", model),
            *(Route(path, answer, methods=["POST"]) for path in PATHS[type(desk)]),
        ],
        exception_handlers=dict.fromkeys((ProtocolError, HTTPException, ClientDisconnect), error_response),
    )


async def _answer_in_turn(desk: EmbeddingDesk | RerankDesk, request: Request, body: bytes) -> bytes:
    """The body of a response that is not generated token by token. Raises: ProtocolError."""
    if isinstance(desk, EmbeddingDesk):
        question = read_embedding_body(body, desk.adapters, desk.embedder.width)
        return await desk.answer(question, request.is_disconnected)
    read = read_rerank_body if request.url.path in RERANK else read_score_body
    return await desk.answer(read(body, desk.adapters), request.is_disconnected)


def _wrong_path(request: Request, status: int, desk: AnyDesk) -> str:
    """Why a path, or its method, has no answer here, and what to do."""
    path, there = request.url.path, f"this server answers {', '.join(f'POST {each}' for each in PATHS[type(desk)])}"
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        return f"{path} does not answer {request.method}: {there}"
    other = next((kind for kind, paths in PATHS.items() if path in paths), None)
    if other is None:
        return f"there is no {path[:100]}: {there}"
    return f"the served model {DOES[type(desk)]}, and {path} needs one that {DOES[other]}: {there}"


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
    memory: tuple[str | None, str | None] = (None, None),
) -> None:
    """Serve until a stop signal arrives. `memory`: sizes of the cache and of the adapters; None: a quarter of the free
    memory each.

    Raises: TunekitError; the command line returns its exit code.
    """
    try:
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(*needed("serving", "run: pip install 'tunekit[serve]'", error)) from error
    key = key or os.environ.get("TUNEKIT_API_KEY")
    if host not in LOCAL_HOSTS and not key:
        how = "set --api-key or TUNEKIT_API_KEY, or remove --host"
        raise InputError(f"on {host} other machines could use the server without a key", how)
    cache_bytes, adapter_bytes = (None if size is None else read_size(size) for size in memory)
    console, spec = Console(), find_target(target, base, overrides)
    embeds = make_family(family_of(spec)).headless
    useless = bool(adapters) or memory != (None, None)
    if embeds and useless:
        raise InputError(f"the target embeds texts, so {OF_CHATS} have no effect", "remove them")
    for folder in adapters:
        check_folder(folder)
    listening = bind(host, port)
    console.warn(*spec.notes)
    console.info(f"loading {spec.model.name_or_path} ...")
    devices = make_devices()
    try:
        loaded, name = load_target(spec, devices.device), name_of(target)
        desk: AnyDesk
        if is_reranker(loaded) and useless:
            raise InputError(f"the target scores documents, so {OF_CHATS} have no effect", "remove them")
        if embeds:
            desk = EmbeddingDesk(make_embedder(loaded, batch_size), name)
        elif is_reranker(loaded):
            desk = RerankDesk(make_reranker(loaded, batch_size), name)
        else:
            speaker = make_speaker(loaded, name, needs_template=False)
            if (usual := trained_system(spec)) is not None:
                first = "the training rows begin with a system message, which clients must send"
                console.info(f"{first}: {json.dumps(usual)}")
            quarter = (available_bytes(devices.device) or 0) // 4
            speaker.adapters.limit_bytes = quarter if adapter_bytes is None else adapter_bytes
            for folder in adapters:
                speaker.adapters.add_folder(folder)
            desk = make_desk(speaker, batch_size, quarter if cache_bytes is None else cache_bytes, console)
        app = make_app(desk, key, max_tokens, only_local=host in LOCAL_HOSTS)
        server = make_server(desk, app)
        threading.Thread(target=_announce, args=(server, console, desk.adapters, host, port), daemon=True).start()
        server.run(sockets=[listening])
        if isinstance(desk, Desk):
            desk.close()
    finally:
        listening.close()
        devices.close()


def make_desk(speaker: Speaker, slots: int, cache_bytes: int, console: Console) -> Desk:
    """A request queue (desk) whose cache fits into `cache_bytes`. Raises: InputError if the memory is too small for any
    answer."""
    tokens, used_bytes = speaker.slot_tokens(slots, cache_bytes)
    if tokens < MIN_TOKENS:
        what = f"{bytes_text(cache_bytes)} of cache have room for only {tokens} tokens in each of {slots} answers"
        raise InputError(what, "set a larger --cache-memory or a smaller --batch-size")
    size = f", {bytes_text(used_bytes)} of cache" if used_bytes else ""
    console.info(f"up to {slots} answers at once, each with up to {tokens:,} tokens of prompt and answer{size}")
    if speaker.adapters.reloads:
        console.info(f"adapters in memory: up to {bytes_text(speaker.adapters.limit_bytes or 0)} (--adapter-memory)")
    speaker.cache_limit = tokens
    return Desk(speaker, slots, tokens)


def read_size(text: str) -> int:
    """The number of bytes in a text such as 8GiB. Raises: InputError if the text is not a size."""
    try:
        return size_bytes(text)
    except ValueError as error:
        raise InputError(f"{text!r} is not a size", f"it {error}") from error


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound to the address before a model is loaded. Raises: InputError if another program uses the
    port."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(
            f"the server cannot listen on {host}:{port} ({error.strerror})", "choose another --port"
        ) from error


def make_server(desk: AnyDesk, app: Starlette) -> Server:
    """A server that ends at once on a signal, and then aborts running answers.

    It accepts few connections at a time, so that it can read each request before many others arrive. The other
    connections wait in the system's queue. Bad requests are not logged, because a client could fill the log with them.
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
    """uvicorn's connection class with two additions. A client must send header and body and read its answer before
    deadlines, because uvicorn waits forever. If there are more than `limit` connections, it closes the connection
    that has kept the server waiting longest."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    deadlines: dict[Connection, asyncio.TimerHandle] = {}  # of connections whose client must act, the oldest first

    class Connection(H11Protocol):  # type: ignore[misc]
        awaited_seconds: float | None = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.await_client()
            if len(self.connections) > limit:
                next(iter(deadlines)).give_up()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.await_client()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.await_client()

        def connection_lost(self, error: Exception | None) -> None:
            self.stop_waiting()
            super().connection_lost(error)

        def shutdown(self) -> None:
            if self in deadlines:
                self.give_up()
            else:
                super().shutdown()

        def await_client(self) -> None:
            """Start a deadline if the server now waits for the client to read, or to send a header or a body."""
            idle = self.cycle is None or self.cycle.response_complete
            seconds = HEADER_SECONDS if idle else BODY_SECONDS if self.cycle.more_body else None
            seconds = READING_SECONDS if self.flow.write_paused else seconds
            if seconds != self.awaited_seconds:
                self.stop_waiting()
                self.awaited_seconds = seconds
                if seconds is not None:
                    deadlines[self] = self.loop.call_later(seconds, self.give_up)

        def pause_writing(self) -> None:
            super().pause_writing()
            self.await_client()

        def resume_writing(self) -> None:
            super().resume_writing()
            self.await_client()

        def stop_waiting(self) -> None:
            if self in deadlines:
                deadlines.pop(self).cancel()

        def give_up(self) -> None:
            self.stop_waiting()
            self.transport.abort()

    return Connection


def _announce(server: Server, console: Console, adapters: Adapters, host: str, port: int) -> None:
    """Print the address as soon as the server listens."""
    while not server.started:
        time.sleep(0.05)
    console.info(f"models: {adapters.listing}", f"serving at http://{host}:{port}/v1 - Ctrl-C ends it")
