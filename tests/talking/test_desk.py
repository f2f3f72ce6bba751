"""The queue of requests: failures reach the clients, in the protocol's form."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.test_serve import Slow, body_of
from tunekit.errors import AdapterError, DataError
from tunekit.talking.completion import ClientAnswer
from tunekit.talking.desk import Desk, Job
from tunekit.talking.protocol import ProtocolError


def test_the_word_tokens_in_an_error_is_not_the_code_of_a_long_text() -> None:
    async def fail() -> None:
        speaker: Any = Slow()
        desk = Desk(speaker, 1, 9)
        answer = ClientAnswer(desk, body_of())
        answer.arrived.put_nowait((0, DataError("the template refuses tokens of this kind")))
        with pytest.raises(ProtocolError) as caught:
            await answer._next()
        assert caught.value.body["error"]["code"] is None
        answer.cancel()
        await asyncio.to_thread(desk.close)

    asyncio.run(asyncio.wait_for(fail(), 60))


def test_clients_do_not_see_the_servers_folders(capsys: pytest.CaptureFixture[str]) -> None:
    async def fail() -> None:
        speaker: Any = Slow()
        desk = Desk(speaker, 1, 9)
        answer = ClientAnswer(desk, body_of())
        errors = [
            AdapterError("is damaged", "write it again", file="/srv/adapters/x/adapter_config.json"),
            FileNotFoundError(2, "No such file or directory", "/srv/adapters/x"),
        ]
        for error, status, text in zip(
            errors, (400, 500), ("is damaged; write it again", "server failed"), strict=True
        ):
            answer.arrived.put_nowait((0, error))
            with pytest.raises(ProtocolError) as caught:
                await answer._next()
            assert caught.value.status == status
            assert text in str(caught.value)
            assert "/" not in str(caught.value)
        answer.cancel()
        await asyncio.to_thread(desk.close)

    asyncio.run(asyncio.wait_for(fail(), 60))
    assert capsys.readouterr().err.count("/srv/adapters/x") == 2


def test_a_failure_to_start_answers_reaches_the_clients() -> None:
    """Each job ends with the error; the desk waits for the next one instead of trying again and again."""

    class Broken(Slow):
        tries, works = 0, False

        @contextmanager
        def answering(self, slots: int, tokens: int) -> Iterator[Any]:
            self.tries += 1
            if not self.works:
                raise MemoryError("no memory")
            self.slots = slots
            yield self

        def step(self) -> None:
            for handle in list(self.running):
                self.running.pop(handle)[1]("ended")

    speaker: Any = Broken()
    desk, ended = Desk(speaker, 1, 9), queue.SimpleQueue[Any]()
    for works in (False, False, True):
        speaker.works = works
        desk.put([Job(body_of().requests[0], "one", lambda text: None, ended.put)])
        assert isinstance(ended.get(timeout=10), MemoryError) or works
    desk.close()
    assert speaker.tries <= 5
