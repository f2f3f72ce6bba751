"""An ASGI application that answers one client request: it turns the answers into a JSON response, or into a stream of
events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from tunekit.errors import DataError, LengthError, TunekitError, exit_message, is_out_of_memory, redact
from tunekit.talking.answer import AnswerPiece, Reply
from tunekit.talking.choices import ChatForm, TextForm, usage
from tunekit.talking.desk import Desk, Job
from tunekit.talking.protocol import ClientQuestion, ProtocolError

Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]
Item = AnswerPiece | Reply | Exception


class ClientAnswer:
    """Sends the answers for one request body to the client. Another thread generates the answers. If the client
    disconnects, the generation ends."""

    def __init__(self, desk: Desk, question: ClientQuestion) -> None:
        self.question = question
        self.arrived: asyncio.Queue[tuple[int, Item]] = asyncio.Queue()
        form = ChatForm if question.is_chat else TextForm
        self.forms = [form(request.top is not None) for request in question.requests]
        loop = asyncio.get_running_loop()

        def deliver(number: int, item: Item) -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(self.arrived.put_nowait, (number, item))

        self.jobs = [
            Job(request, question.name, partial(deliver, number), partial(deliver, number), question.seeded)
            for number, request in enumerate(question.requests)
        ]
        name = f"{self.forms[0].prefix}-{uuid.uuid4().hex}"
        self.facts = {"id": name, "created": int(time.time()), "model": question.name}
        desk.put(self.jobs)

    async def __call__(self, scope: object, receive: Receive, send: Send) -> None:
        """Send the answers. Raises: ProtocolError, but only before the first piece is sent; later, an HTTP status
        cannot report an error."""
        leaving = asyncio.ensure_future(self._until_client_leaves(receive))
        try:
            if self.question.stream:
                await self._stream(send)
            else:
                body = json.dumps(await self._complete()).encode()
                await _start(send, "application/json", ("content-length", str(len(body))))
                await send({"type": "http.response.body", "body": body})
        finally:
            leaving.cancel()
            self.cancel()

    def cancel(self) -> None:
        """End the jobs of this request."""
        for job in self.jobs:
            job.cancelled.set()

    async def _until_client_leaves(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.cancel()

    async def _next(self) -> tuple[int, AnswerPiece | Reply]:
        """Wait for the next piece of text, or the complete answer, of any choice. Raises: ProtocolError."""
        number, item = await self.arrived.get()
        if isinstance(item, Exception):
            raise protocol_error(item, "messages" if self.question.is_chat else "prompt")
        return number, item

    async def _complete(self) -> dict[str, Any]:
        """All answers."""
        replies: dict[int, Reply] = {}
        while len(replies) < len(self.jobs):
            number, item = await self._next()
            if isinstance(item, Reply):
                replies[number] = item
        choices = [{"index": number, **form.choice(replies[number])} for number, form in enumerate(self.forms)]
        counts = usage([replies[number] for number in range(len(self.jobs))], self.question.choices)
        return {**self.facts, "object": self.forms[0].complete, "choices": choices, "usage": counts}

    async def _stream(self, send: Send) -> None:
        """Send the answers as a stream of events, as in OpenAI's API."""
        number, item = await self._next()
        await _start(send, "text/event-stream", ("cache-control", "no-cache"))
        for place, form in enumerate(self.forms):
            for event in form.first():
                await self._send(send, {"choices": [{"index": place, **event}]})
        replies: dict[int, Reply] = {}
        try:
            while True:
                form = self.forms[number]
                for event in form.last(item) if isinstance(item, Reply) else [form.piece(item)]:
                    await self._send(send, {"choices": [{"index": number, **event}]})
                if isinstance(item, Reply):
                    replies[number] = item
                    if len(replies) == len(self.jobs):
                        break
                number, item = await self._next()
            if self.question.with_usage:
                counts = usage([replies[place] for place in range(len(self.jobs))], self.question.choices)
                await self._send(send, {"choices": [], "usage": counts})
        except ProtocolError as error:
            await _send_event(send, json.dumps(error.body))
        await _send_event(send, "[DONE]", more=False)

    async def _send(self, send: Send, value: dict[str, Any]) -> None:
        await _send_event(send, json.dumps({**self.facts, "object": self.forms[0].part, **value}))


def protocol_error(error: Exception, field: str) -> ProtocolError:
    """The error that a client gets. `field`: the field of the request with the texts."""
    if isinstance(error, DataError | LengthError):
        code = "context_length_exceeded" if isinstance(error, LengthError) else None
        return ProtocolError(400, _without_files(error), field, code)
    if isinstance(error, TunekitError):
        if any(problem.file for problem in error.problems):  # a fault of the server, not of the request
            _print_once(str(error))
        return ProtocolError(400, _without_files(error))
    if isinstance(error, ConnectionError):
        return ProtocolError(503, str(error))
    _print_once(exit_message(error)[0])
    return ProtocolError(
        500, "memory ran out" if is_out_of_memory(error) else "the server failed, and printed the reason"
    )


def _without_files(error: TunekitError) -> str:
    """The text of an error for clients, who must not see the server's folders."""
    return redact("; ".join(str(replace(problem, file=None, line=None)) for problem in error.problems))


@lru_cache(maxsize=100)
def _print_once(text: str) -> None:
    """Print the complete text of an error on the server, but not again for each request that causes it."""
    print(redact(text), file=sys.stderr, flush=True)


async def _start(send: Send, kind: str, header: tuple[str, str]) -> None:
    headers = [(name.encode(), value.encode()) for name, value in (("content-type", kind), header)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _send_event(send: Send, data: str, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": more})
