"""Formats answers as in OpenAI's API: the choices of chat completions and of completions, complete or streamed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunekit.talking.answer import AnswerPiece, Reply, TokenScore


class ChatForm:
    """Formats the choices of chat completions. `scored`: whether the client requests log-probabilities."""

    prefix, complete, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, scored: bool) -> None:
        self.scored = scored

    def choice(self, reply: Reply) -> dict[str, Any]:
        """A complete answer as a choice."""
        calls = {"tool_calls": list(reply.calls)} if reply.calls else {}
        content = None if reply.calls and not reply.text else reply.text
        message = {"role": "assistant", "content": content, "refusal": None, **calls}
        scores = _chat_scores(reply.scores) if self.scored else None
        return {"message": message, "logprobs": scores, "finish_reason": reply.reason}

    def first(self) -> list[dict[str, Any]]:
        """The events before the first piece of text: one event with the role."""
        return [self._event({"role": "assistant", "content": ""})]

    def piece(self, piece: AnswerPiece) -> dict[str, Any]:
        """The event of a piece of text."""
        return self._event({"content": piece.text}, piece.scores)

    def last(self, reply: Reply) -> list[dict[str, Any]]:
        """The events after the last piece of text."""
        calls = [{"tool_calls": [{"index": at, **call} for at, call in enumerate(reply.calls)]}] if reply.calls else []
        return [*map(self._event, calls), {**self._event({}), "finish_reason": reply.reason}]

    def _event(self, delta: dict[str, Any], scores: Sequence[TokenScore] = ()) -> dict[str, Any]:
        return {"delta": delta, "logprobs": _chat_scores(scores) if scores else None, "finish_reason": None}


class TextForm:
    """Formats the choices of (text) completions. `scored`: whether the client requests log-probabilities."""

    prefix, complete, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, scored: bool) -> None:
        self.scored = scored
        self.written = 0  # the number of characters so far
        self.offset = 0  # the place of the next token; larger if a part of the last token was not written yet

    def choice(self, reply: Reply) -> dict[str, Any]:
        """A complete answer as a choice."""
        parts = [self._scores(piece) for piece in reply.pieces]
        scores = {name: [value for part in parts for value in part[name]] for name in parts[0]}
        return {"text": reply.text, "logprobs": scores if self.scored else None, "finish_reason": reply.reason}

    def first(self) -> list[dict[str, Any]]:
        """The events before the first piece of text: none."""
        return []

    def piece(self, piece: AnswerPiece) -> dict[str, Any]:
        """The event of a piece of text."""
        scores = self._scores(piece)
        return {"text": piece.text, "logprobs": scores if piece.scores else None, "finish_reason": None}

    def last(self, reply: Reply) -> list[dict[str, Any]]:
        """The events after the last piece of text: one event with the reason why the answer ended."""
        return [{"text": "", "logprobs": None, "finish_reason": reply.reason}]

    def _scores(self, piece: AnswerPiece) -> dict[str, list[Any]]:
        """The log-probabilities of a piece's tokens. If two of the most likely tokens have the same text, only the
        likelier one is listed."""
        start, offsets, data = self.offset, list[int](), b""
        first = next((score.data for score in piece.scores if score.in_text), b"")
        drops_space = not start and first.startswith(b" ") and not piece.text.startswith(" ")  # of a whole text
        for score in piece.scores:
            offsets.append(self.offset)
            data += score.data if score.in_text else b""
            self.offset = max(start + len(data.decode("utf-8", "replace")) - drops_space, start)
        self.written += len(piece.text)
        self.offset = max(self.offset, self.written)
        tops = [
            None
            if score.logprob is None
            else {token_name(data): logprob for data, logprob in [(score.data, score.logprob), *reversed(score.top)]}
            for score in piece.scores
        ]
        return {
            "tokens": [token_name(score.data) for score in piece.scores],
            "token_logprobs": [score.logprob for score in piece.scores],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def usage(replies: Sequence[Reply], choices: int) -> dict[str, int]:
    """Token counts as in OpenAI's API. `choices`: the number of choices for each prompt; the tokens of a prompt count
    only once."""
    prompt, new = sum(reply.prompt_tokens for reply in replies[::choices]), sum(reply.new_tokens for reply in replies)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def token_name(data: bytes) -> str:
    """The text of a token. If its bytes are not complete characters, the bytes, written as in OpenAI's API."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _chat_scores(scores: Sequence[TokenScore]) -> dict[str, Any]:
    content = []
    for score in scores:
        top = [_chat_token(data, logprob) for data, logprob in score.top]
        content.append({**_chat_token(score.data, score.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _chat_token(data: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": token_name(data), "bytes": list(data), "logprob": logprob}
