"""`tunekit serve`: a target goes in; an OpenAI-compatible endpoint on this machine comes out, until it is stopped.

GET /v1/models; POST /v1/chat/completions, streamed or whole. Every adapter is a model name over the one base.
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
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tunekit.console import Console
from tunekit.contracts import GREEDY, Sampling
from tunekit.errors import DataError, InputError, TunekitError
from tunekit.formats.chat import read_tool_calls
from tunekit.formats.example import ROLES, Message
from tunekit.machine.devices import make_devices
from tunekit.talking.conversation import Reply, Request, Speaker, add_folders, make_speaker, name_of
from tunekit.talking.desk import Desk, Job
from tunekit.targets.target import find_target, load_target

LOCAL = ("127.0.0.1", "localhost", "::1")
LARGEST_BODY_BYTES = 4_000_000
NEUTRAL: dict[str, tuple[object, ...]] = {  # fields of the protocol that are taken only where they change nothing
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
READ = ("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "stream")
WITHOUT_EFFECT = ("stream_options", "user", "metadata", "store", "service_tier")
KINDS = {bool: "true or false", dict: "an object"}
EMPTY: tuple[object, ...] = (None, "", [], {})
KNOWN = frozenset((*READ, *NEUTRAL, *WITHOUT_EFFECT))


class ProtocolError(Exception):
    """An answer in the protocol's form of an error."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Asked:
    """What a body of a chat completion asks for."""

    name: str
    request: Request
    stream: bool
    with_usage: bool
    seeded: bool


def read_body(body: bytes, names: Sequence[str], most_tokens: int) -> Asked:
    """Raises: ProtocolError naming the field that is wrong."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ProtocolError(400, "the body must be a JSON object")
    for field, found in value.items():
        if field not in KNOWN:
            raise ProtocolError(400, f"'{field}' is not known here", field, "unknown_parameter")
        if field in NEUTRAL and found is not None and found not in NEUTRAL[field]:
            raise ProtocolError(400, f"'{field}' is not supported", field, "unsupported_parameter")
    name = value.get("model")
    if not isinstance(name, str) or name not in names:
        text = "'model' is required" if name is None else f"there is no model {name!r}"
        raise ProtocolError(404, f"{text}; there are: {', '.join(names)}", "model", "model_not_found")
    return Asked(
        name,
        Request(
            _messages(value.get("messages")), _most(value, most_tokens), _sampling(value), _stop(value.get("stop"))
        ),
        stream=_of_kind(value, "stream", bool, False),
        with_usage=_of_kind(value, "stream_options", dict, {}).get("include_usage") is True,
        seeded=value.get("seed") is not None,
    )


def _of_kind(value: dict[str, Any], field: str, kind: type[Any], default: Any) -> Any:
    found = value.get(field)
    if found is not None and not isinstance(found, kind):
        raise ProtocolError(400, f"'{field}' must be {KINDS[kind]}", field, "invalid_value")
    return default if found is None else found


def _number(value: dict[str, Any], field: str, default: float, low: float, high: float) -> float:
    found = value.get(field)
    if found is None:
        return default
    if isinstance(found, bool) or not isinstance(found, int | float) or not low <= found <= high:
        raise ProtocolError(400, f"'{field}' must be a number from {low:g} to {high:g}", field, "invalid_value")
    return found


def _sampling(value: dict[str, Any]) -> Sampling:
    """Without a seed 0, for which the desk draws one."""
    temperature, top_p = _number(value, "temperature", 1.0, 0, 2), _number(value, "top_p", 1.0, 1e-6, 1)
    seed = _number(value, "seed", 0, 0, 2**63 - 1)
    return Sampling(float(temperature), float(top_p), 0, int(seed)) if temperature else GREEDY


def _most(value: dict[str, Any], default: int) -> int:
    field = "max_completion_tokens" if value.get("max_completion_tokens") is not None else "max_tokens"
    found = _number(value, field, default, 1, 1_000_000)
    if found != int(found):
        raise ProtocolError(400, f"'{field}' must be a whole number", field, "invalid_value")
    return int(found)


def _stop(found: object) -> tuple[str, ...]:
    texts = [] if found is None else [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or len(texts) > 4 or not all(isinstance(text, str) and text for text in texts):
        raise ProtocolError(400, "'stop' must be a text or up to four texts", "stop", "invalid_value")
    return tuple(texts)


def _messages(found: object) -> tuple[Message, ...]:
    if not isinstance(found, list) or not found:
        raise ProtocolError(400, "'messages' must be a list with one message or more", "messages", "invalid_value")
    return tuple(_message(item, f"messages.{at}") for at, item in enumerate(found))


def _message(item: object, place: str) -> Message:
    if not isinstance(item, dict) or item.get("role") not in ROLES:
        raise ProtocolError(400, f"a message needs a role of {', '.join(ROLES)}", f"{place}.role", "invalid_value")
    content = item.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise ProtocolError(400, "only parts of type text are read", f"{place}.content", "invalid_value")
        content = "".join(part["text"] for part in content)
    if content is None and item.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise ProtocolError(400, "a message needs a text", f"{place}.content", "invalid_value")
    extra = {name: value for name, value in item.items() if name not in ("role", "content") and value not in EMPTY}
    if "tool_calls" in extra:
        try:
            extra["tool_calls"] = read_tool_calls(extra["tool_calls"], f"{place}.tool_calls")
        except DataError as error:
            raise ProtocolError(400, str(error), f"{place}.tool_calls", "invalid_value") from None
    return Message(item["role"], content, extra=extra)


async def whole_body(request: Any) -> bytes:
    """Raises: ProtocolError where it is too large."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY_BYTES:
            raise ProtocolError(413, f"the body is larger than {LARGEST_BODY_BYTES:,} bytes")
    return bytes(body)


def make_app(desk: Desk, key: str | None, most_tokens: int) -> Any:
    """The endpoint as an ASGI application. `key`: what clients must give; None: nothing."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    names, began = desk.speaker.names, int(time.time())

    def refused(request: Any, error: Exception) -> Response:
        assert isinstance(error, ProtocolError)  # its text may quote half a surrogate pair, which json escapes
        return Response(json.dumps(error.body), error.status, media_type="application/json")

    def gone(request: Any, error: Exception) -> Response:
        return refused(request, ProtocolError(400, "the client left before its request was whole"))

    def not_found(request: Any, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return refused(request, ProtocolError(error.status_code, str(error.detail)))

    def check_key(request: Any) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if key is not None and not hmac.compare_digest(given, key.encode()):
            raise ProtocolError(401, "the key is missing or wrong", code="invalid_api_key")

    async def health(request: Any) -> Any:
        return JSONResponse({"status": "ok"})

    async def models(request: Any) -> Any:
        check_key(request)
        each = [{"id": name, "object": "model", "created": began, "owned_by": "tunekit"} for name in names]
        return JSONResponse({"object": "list", "data": each})

    async def completions(request: Any) -> Any:
        check_key(request)
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
        exception_handlers={ProtocolError: refused, HTTPException: not_found, ClientDisconnect: gone},
    )


class Talk:
    """One completion on its way from the desk's thread to its client."""

    def __init__(self, desk: Desk, asked: Asked) -> None:
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
            raise ProtocolError(
                400, str(found), "messages", "context_length_exceeded" if "tokens" in str(found) else None
            )
        if isinstance(found, TunekitError):
            raise ProtocolError(400, str(found))
        if isinstance(found, Exception):
            raise ProtocolError(503 if isinstance(found, ConnectionError) else 500, str(found))
        return found

    async def whole(self, request: Any) -> dict[str, Any]:
        """The answer in one."""
        while not isinstance(found := await self._wanted(request), Reply):
            pass
        message = {"role": "assistant", "content": found.text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": found.reason}
        return {**self.facts, "object": "chat.completion", "choices": [choice], "usage": usage(found)}

    async def begun(self, request: Any) -> None:
        """Wait for the first piece, so that what is wrong with the request has its own status."""
        self._first = await self._wanted(request)

    async def _wanted(self, request: Any) -> str | Reply:
        """The next piece; the job is given up where the client is gone."""
        waiting = asyncio.ensure_future(self._next())
        while not (await asyncio.wait([waiting], timeout=1.0))[0]:
            if await request.is_disconnected():
                self.job.cancelled.set()
        return waiting.result()

    async def send(self, events: Any, *of_asgi: Any) -> None:
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


def usage(reply: Reply) -> dict[str, int]:
    """Tokens as the protocol counts them."""
    counts = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.new_tokens}
    return {**counts, "total_tokens": sum(counts.values())}


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
    if host not in LOCAL and not key:
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
        server = make_server(desk, make_app(desk, key, most_tokens), host, port)
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


def make_server(desk: Desk, app: Any, host: str, port: int) -> Any:
    """A server that a signal ends at once: the answers that are being made are given up with it."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning"))

    def end_with_answers(*signal: Any, end: Any = server.handle_exit) -> None:
        desk.stop()
        end(*signal)

    server.handle_exit = end_with_answers
    return server


def _announce(server: Any, console: Console, speaker: Speaker, host: str, port: int) -> None:
    """Say where it listens, once it does."""
    while not server.started:
        time.sleep(0.05)
    console.info(f"models: {', '.join(speaker.names)}", f"serving at http://{host}:{port}/v1 - Ctrl-C ends it")
