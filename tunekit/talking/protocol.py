"""The protocol of OpenAI's chat completions: strict reading of request bodies, and writing of usage and errors."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tunekit.contracts import GREEDY, Sampling
from tunekit.errors import DataError
from tunekit.formats.chat import read_tool_calls
from tunekit.formats.example import ROLES, Message
from tunekit.talking.conversation import Reply, Request

T = TypeVar("T")
NEUTRAL: dict[str, tuple[object, ...]] = {  # fields that are accepted only with values that change nothing
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
KINDS: dict[type, str] = {bool: "true or false", dict: "an object"}
EMPTY: tuple[object, ...] = (None, "", [], {})
KNOWN = frozenset((*READ, *NEUTRAL, *WITHOUT_EFFECT))


class ProtocolError(Exception):
    """An error response in the protocol's form."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class ChatRequest:
    """The content of a request body: the adapter's name, the conversation, and settings for the answer."""

    name: str
    request: Request
    stream: bool
    with_usage: bool
    seeded: bool


def read_body(body: bytes, names: Sequence[str], max_tokens: int) -> ChatRequest:
    """Read a body. Raises: ProtocolError with the name of the wrong field."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ProtocolError(400, "the body must be a JSON object")
    for field, content in value.items():
        if field not in KNOWN:
            raise ProtocolError(400, f"'{field}' is not a known field", field, "unknown_parameter")
        if field in NEUTRAL and content is not None and content not in NEUTRAL[field]:
            raise ProtocolError(400, f"'{field}' is not supported", field, "unsupported_parameter")
    name = value.get("model")
    if not isinstance(name, str) or name not in names:
        text = "'model' is required" if name is None else f"there is no model {name!r}"
        raise ProtocolError(404, f"{text}; there are: {', '.join(names)}", "model", "model_not_found")
    return ChatRequest(
        name,
        Request(
            _messages(value.get("messages")), _max_tokens(value, max_tokens), _sampling(value), _stop(value.get("stop"))
        ),
        stream=_of_kind(value, "stream", bool, False),
        with_usage=_of_kind(value, "stream_options", dict, {}).get("include_usage") is True,
        seeded=value.get("seed") is not None,
    )


def _of_kind(body: Mapping[str, object], field: str, kind: type[T], default: T) -> T:
    value = body.get(field)
    if value is not None and not isinstance(value, kind):
        raise ProtocolError(400, f"'{field}' must be {KINDS[kind]}", field, "invalid_value")
    return default if value is None else value


def _number(body: Mapping[str, object], field: str, default: float, low: float, high: float) -> float:
    number = body.get(field)
    if number is None:
        return default
    if isinstance(number, bool) or not isinstance(number, int | float) or not low <= number <= high:
        raise ProtocolError(400, f"'{field}' must be a number from {low:g} to {high:g}", field, "invalid_value")
    return number


def _sampling(body: Mapping[str, object]) -> Sampling:
    """The sampling settings. If the client sends no seed, `seed` is 0 and the desk draws one."""
    temperature, top_p = _number(body, "temperature", 1.0, 0, 2), _number(body, "top_p", 1.0, 1e-6, 1)
    seed = _number(body, "seed", 0, 0, 2**63 - 1)
    return Sampling(float(temperature), float(top_p), 0, int(seed)) if temperature else GREEDY


def _max_tokens(body: Mapping[str, object], default: int) -> int:
    field = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    number = _number(body, field, default, 1, 1_000_000)
    if number != int(number):
        raise ProtocolError(400, f"'{field}' must be a whole number", field, "invalid_value")
    return int(number)


def _stop(stops: object) -> tuple[str, ...]:
    texts = [] if stops is None else [stops] if isinstance(stops, str) else stops
    if not isinstance(texts, list) or len(texts) > 4 or not all(isinstance(text, str) and text for text in texts):
        raise ProtocolError(400, "'stop' must be a text or up to four texts", "stop", "invalid_value")
    return tuple(texts)


def _messages(messages: object) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages:
        raise ProtocolError(400, "'messages' must be a list with one message or more", "messages", "invalid_value")
    return tuple(_message(item, f"messages.{at}") for at, item in enumerate(messages))


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


def usage(reply: Reply) -> dict[str, int]:
    """Token counts in the protocol's form."""
    counts = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.new_tokens}
    return {**counts, "total_tokens": sum(counts.values())}
