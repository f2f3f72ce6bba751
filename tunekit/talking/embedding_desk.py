"""Answers requests for embeddings, one after another, while other threads read and write the connections."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from torch import Tensor

from tunekit.talking.adapters import BASE, Adapters
from tunekit.talking.completion import protocol_error
from tunekit.talking.desk import MAX_JOBS, shutdown_error
from tunekit.talking.embedder import Embedder, floats
from tunekit.talking.protocol import EmbeddingQuestion, ProtocolError
from tunekit.targets.target import LoadedTarget

Question = TypeVar("Question")


class TurnDesk(Generic[Question]):
    """Answers requests one after another. The model called BASE is the base without the target's adapter."""

    def __init__(self, loaded: LoadedTarget, name: str) -> None:
        self.adapters = Adapters(loaded.model.base)
        if (adapter := loaded.model.adapter) is not None:
            self.adapters.put("adapter" if name == BASE else name, adapter)
        self._stopped, self._turn, self._waiting = threading.Event(), asyncio.Lock(), 0

    async def answer(self, question: Question, has_left: Callable[[], Awaitable[bool]]) -> bytes:
        """The body of the response. `has_left`: whether the client has disconnected. Raises: ProtocolError."""
        if self._waiting >= MAX_JOBS:
            raise ProtocolError(503, f"{MAX_JOBS} requests are waiting already; try again later")
        self._waiting += 1
        try:
            async with self._turn:
                if await has_left():
                    raise ProtocolError(400, "the client left before its request was answered")
                return await asyncio.to_thread(self._response, question)
        except ProtocolError:
            raise
        except Exception as error:
            raise protocol_error(error, "input") from error
        finally:
            self._waiting -= 1

    def stop(self) -> None:
        """Abort running requests. Their clients get an error."""
        self._stopped.set()

    def check_open(self) -> None:
        """Raises: an error for the client if the server is stopping."""
        if self._stopped.is_set():
            raise shutdown_error()

    def _response(self, question: Question) -> bytes:
        """The body of the response."""
        raise NotImplementedError


class EmbeddingDesk(TurnDesk[EmbeddingQuestion]):
    """Answers requests for embeddings."""

    def __init__(self, embedder: Embedder, name: str) -> None:
        super().__init__(embedder.loaded, name)
        self.embedder = embedder

    def _response(self, question: EmbeddingQuestion) -> bytes:
        vectors, tokens = self._embed(question)
        if question.dimensions is not None:
            vectors = self.embedder.shortened(vectors, question.dimensions)
        write = _in_base64 if question.is_base64 else floats
        data = [
            {"object": "embedding", "index": index, "embedding": write(vector)} for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return json.dumps({"object": "list", "data": data, "model": question.name, "usage": usage}).encode()

    def _embed(self, question: EmbeddingQuestion) -> tuple[Tensor, int]:
        """The embeddings of the texts (N, D), and their number of tokens."""
        rows = [self.embedder.encode(text, question.side) for text in question.texts]
        with self.adapters.using(question.name):
            vectors = self.embedder.embed(rows, self.check_open)
        return vectors, sum(row.sizes[0] for row in rows)


def _in_base64(vector: Tensor) -> str:
    """The float32 numbers, little-endian, in base64."""
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
