"""Formats answers as in OpenAI's API: the choices of chat completions and of completions, complete or streamed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunekit.talking.answer import AnswerPiece, Reply, TokenScore


class ChatForm:
    """Formats the choices of chat completions."""

    prefix, complete, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, reply: Reply) -> dict[str, Any]:
        """A complete answer as a choice."""
        calls = {"tool_calls": list(reply.calls)} if reply.calls else {}
        content = None if reply.calls and not reply.text else reply.text
        message = {"role": "assistant", "content": content, "refusal": None, **calls}
        return {"message": message, "logprobs": _chat_scores(reply.scores), "finish_reason": reply.reason}

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
        return {"delta": delta, "logprobs": _chat_scores(scores), "finish_reason": None}


class TextForm:
    """Formats the choices of (text) completions. `offset`: the number of characters so far."""

    prefix, complete, part = "cmpl", "text_completion", "text_completion"

    def __init__(self) -> None:
        self.offset = 0

    def choice(self, reply: Reply) -> dict[str, Any]:
        """A complete answer as a choice."""
        parts = [scores for piece in reply.pieces if (scores := self.piece(piece)["logprobs"])]
        scores = {name: [value for part in parts for value in part[name]] for name in parts[0]} if parts else None
        return {"text": reply.text, "logprobs": scores, "finish_reason": reply.reason}

    def first(self) -> list[dict[str, Any]]:
        """The events before the first piece of text: none."""
        return []

    def piece(self, piece: AnswerPiece) -> dict[str, Any]:
        """The event of a piece of text."""
        offset, self.offset = self.offset, self.offset + len(piece.text)
        return {"text": piece.text, "logprobs": _text_scores(piece, offset), "finish_reason": None}

    def last(self, reply: Reply) -> list[dict[str, Any]]:
        """The events after the last piece of text: one event with the reason why the answer ended."""
        return [{"text": "", "logprobs": None, "finish_reason": reply.reason}]


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


def _chat_scores(scores: Sequence[TokenScore]) -> dict[str, Any] | None:
    if not scores:
        return None
    content = []
    for score in scores:
        top = [_chat_token(data, logprob) for data, logprob in score.top]
        content.append({**_chat_token(score.data, score.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _chat_token(data: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": token_name(data), "bytes": list(data), "logprob": logprob}


def _text_scores(piece: AnswerPiece, offset: int) -> dict[str, Any] | None:
    """The log-probabilities of a piece's tokens. `offset`: the position of the piece's first character in the answer.
    If two of the most likely tokens have the same text, only the likelier one is listed."""
    scores = piece.scores
    if not scores:
        return None
    names, offsets, data = [token_name(score.data) for score in scores], [], b""
    first = next((score.data for score in scores if score.in_text), b"")
    drops_space = first.startswith(b" ") and not piece.text.startswith(" ")  # as many tokenizers do, of a whole text
    for score in scores:
        offsets.append(max(offset + len(data.decode("utf-8", "replace")) - drops_space, offset))
        data += score.data if score.in_text else b""
    tops = [
        None
        if score.logprob is None
        else {token_name(data): logprob for data, logprob in [(score.data, score.logprob), *reversed(score.top)]}
        for score in scores
    ]
    return {
        "tokens": names,
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": tops,
        "text_offset": offsets,
    }
