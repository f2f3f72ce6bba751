"""A request for an answer, and the answer while it is generated: pieces of text, log-probabilities, tool calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from tunekit.basics import JsonObject
from tunekit.contracts import GREEDY, Sampling
from tunekit.formats.example import Message
from tunekit.talking.tools import ToolFormat

UNFINISHED = "�"  # the character that stands for an incomplete multi-byte character
CHARACTER_TOKENS = 4  # the maximum of tokens of one character, which has up to 4 bytes


@dataclass(frozen=True)
class Request:
    """A request for an answer: a conversation (`messages`) to answer, or a text or token ids (`prompt`) to continue.

    `stop`: texts that end the answer and are not part of it. `tools`: definitions of functions that the answer may
    call. `single_call`: the answer has at most one call. `required`: the answer must be a call of one of these tools.
    `schema`: the JSON schema that the answer must follow. `top`: return log-probabilities, and those of the `top` most
    likely tokens at each position. `echoes`: the answer starts with the prompt.
    `Speaker.prepare` sets `prompt`, `stop_ids` (the tokens that end the answer), `allowed` (which tokens may come next)
    and `tool_format`.
    """

    messages: Sequence[Message] = ()
    max_new_tokens: int = 1
    sampling: Sampling = GREEDY
    stop: Sequence[str] = ()
    prompt: Sequence[int] = ()
    text: str | None = None
    tools: Sequence[JsonObject] = ()
    single_call: bool = False
    required: Sequence[JsonObject] = ()
    schema: JsonObject | None = None
    top: int | None = None
    echoes: bool = False
    stop_ids: frozenset[int] = frozenset()
    allowed: Callable[[Sequence[int]], Tensor] | None = None
    tool_format: ToolFormat | None = None


class TokenScore(NamedTuple):
    """A token's bytes and log-probability. `top`: the most likely tokens at its position, with their log-probabilities.
    The first token of a prompt has no log-probability. `in_text`: whether the text contains the token; special tokens
    are not in the text."""

    data: bytes
    logprob: float | None = None
    top: tuple[tuple[bytes, float], ...] = ()
    in_text: bool = True


class AnswerPiece(NamedTuple):
    """The next characters of an answer; and the log-probabilities of their tokens, if the request asks for them."""

    text: str
    scores: tuple[TokenScore, ...] = ()


@dataclass(frozen=True)
class Reply:
    """A complete answer, and the reason why it ended: "stop" (an end token or a stop text), "length" (the maximum
    number of tokens) or "tool_calls"."""

    text: str
    prompt_tokens: int
    new_tokens: int
    reason: str
    pieces: tuple[AnswerPiece, ...] = ()
    calls: tuple[JsonObject, ...] = ()

    @property
    def scores(self) -> list[TokenScore]:
        """The scores of all tokens."""
        return [score for piece in self.pieces for score in piece.scores]


class AnswerWriter:
    """Decodes an answer while it is generated. It returns only complete characters; no part of a stop text, and no tool
    call."""

    def __init__(self, decode: Callable[..., str], request: Request) -> None:
        self.decode, self.request = decode, request
        self.ids: list[int] = []
        self.written, self.ended, self.reason = "", False, "length"
        self.pieces: list[AnswerPiece] = []
        self.calls: tuple[JsonObject, ...] = ()
        self._scores: list[TokenScore] = []
        self._shown = 0  # the number of scores that have been shown

    def echo(self, text: str, scores: Sequence[TokenScore]) -> AnswerPiece:
        """Return the prompt as the first piece of the answer."""
        self.pieces.append(AnswerPiece(text, tuple(scores)))
        return self.pieces[-1]

    def add(self, token: int, score: TokenScore | None = None) -> AnswerPiece:
        """Add a token. Returns the text that can be shown now; it may be empty."""
        if not self.request.max_new_tokens:
            self.ended = True
            return AnswerPiece("")
        if score is not None and (token not in self.request.stop_ids or not self.request.messages):
            self._scores.append(score)
        if token in self.request.stop_ids:
            self.ended, self.reason = True, "stop"
            return AnswerPiece("")
        self.ids.append(token)
        self.ended = len(self.ids) >= self.request.max_new_tokens
        text = self._text()
        if any(stop in text for stop in self.request.stop):
            self.ended, self.reason = True, "stop"
            return AnswerPiece("")  # `finish` cuts the text
        ends = [len(text) - _overlap(text, stop) for stop in self.request.stop]
        if self.request.tool_format is not None:
            ends.append(self.request.tool_format.start(text))
        return AnswerPiece("") if text.endswith(UNFINISHED) else self._show(text[: min(ends, default=len(text))])

    def finish(self) -> AnswerPiece:
        """The remaining text, which was held back. Stop texts and tool calls are removed."""
        text, shape = self._text(), self.request.tool_format
        text = text[: min((text.index(stop) for stop in self.request.stop if stop in text), default=len(text))]
        if shape is not None:
            start = shape.start(text)
            if calls := shape.read(text[start:], self.request.tools):
                self.calls, self.reason = calls[:1] if self.request.single_call else calls, "tool_calls"
                text = text[:start]
        return self._show(text)

    def reply(self) -> Reply:
        """The complete answer. Call `finish` first."""
        text = "".join(piece.text for piece in self.pieces)
        return Reply(text, len(self.request.prompt), len(self.ids), self.reason, tuple(self.pieces), self.calls)

    def _text(self) -> str:
        return str(self.decode(self.ids, skip_special_tokens=True))

    def _show(self, text: str) -> AnswerPiece:
        """The part of `text` that was not shown before, with the scores of its tokens."""
        more, count = text[len(self.written) :], len(self._scores)
        if self._scores and len(text) < len(self._text()):
            lengths = (len(self.decode(self.ids[:place], skip_special_tokens=True)) for place in range(count))
            count = next((place for place, length in enumerate(lengths) if length >= len(text)), count)
        self.written += more
        piece = AnswerPiece(more, tuple(self._scores[self._shown : count]))
        self._shown = max(self._shown, count)
        self.pieces.append(piece)
        return piece


def decoder_after(decode: Callable[..., str], prompt: Sequence[int]) -> Callable[..., str]:
    """Returns a function that decodes tokens as the continuation of a prompt. If tokens are decoded without the prompt,
    many tokenizers drop the space before the first token."""
    ends = ([*prompt[-size:]] for size in range(1, CHARACTER_TOKENS + 1))
    before = next((ids for ids in ends if UNFINISHED not in decode(ids, skip_special_tokens=True)), [])
    start = len(decode(before, skip_special_tokens=True))
    return lambda ids, **options: decode([*before, *ids], **options)[start:]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` could be the beginning of the stop text."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
