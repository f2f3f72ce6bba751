"""Reads request bodies of OpenAI's API (chat completions, completions and embeddings) and of rerankers, and refuses
unknown fields and wrong values."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, TypeGuard, TypeVar

from tunekit.basics import JsonObject
from tunekit.contracts import GREEDY, Sampling
from tunekit.errors import DataError
from tunekit.formats.chat import read_tool_calls, read_tools
from tunekit.formats.example import ROLES, Message
from tunekit.model.call import seed_for
from tunekit.model.text.draws import PENALTIES
from tunekit.talking.adapters import Adapters
from tunekit.talking.answer import Request
from tunekit.talking.desk import MAX_JOBS
from tunekit.talking.tools import tool_name

T = TypeVar("T")
Body = Mapping[str, object]
MAX_CHOICES, MAX_TOP = 128, 20  # the largest n, and the largest number of most likely tokens
MAX_STOPS = 16  # lm-eval's tasks have up to seven
MAX_STOP_LENGTH = 1000  # characters: each new token is compared with all beginnings of a stop text
COMPLETION_TOKENS = 16  # of a completion whose client sets no limit
SHARED = (
    *("model", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stream", "stream_options", "n", "max_tokens"),
    *("logprobs", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"),
)
READ = {  # by endpoint
    "chat": (
        *(*SHARED, "messages", "max_completion_tokens", "top_logprobs", "response_format"),
        *("tools", "tool_choice", "parallel_tool_calls"),
    ),
    "completions": (*SHARED, "prompt", "echo"),
    "embeddings": ("model", "input", "dimensions", "encoding_format", "prompt_name"),
    "rerank": ("model", "query", "documents", "top_n", "return_documents"),
    "score": ("model", "text_1", "text_2"),
}
WITHOUT_EFFECT: dict[str, type] = {  # fields and their kinds
    **dict.fromkeys(("user", "service_tier", "safety_identifier", "prompt_cache_key"), str),
    "metadata": dict,
    "store": bool,
}
MAX_BIASES = 1024
MAX_INPUTS = 2048  # texts of one request for embeddings
# fields that are accepted only with values that change nothing
NEUTRAL_IN: dict[str, dict[str, tuple[object, ...]]] = {
    "chat": {"modalities": (["text"],)},
    "completions": {"suffix": ("",), "best_of": (1,)},
    "embeddings": {},
    "rerank": {},
    "score": {},
}
KINDS: dict[type, str] = {bool: "true or false", dict: "an object", str: "a text"}
EMPTY: tuple[object, ...] = (None, "", [], {})
JSON_OBJECT: JsonObject = {"type": "object"}


class ProtocolError(Exception):
    """An error response in the format of OpenAI's API."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class ClientQuestion:
    """The content of a request body. `requests`: one request per choice; each prompt has `choices` choices. `is_chat`:
    true for chat completions, false for completions."""

    name: str
    requests: tuple[Request, ...]
    choices: int
    is_chat: bool
    stream: bool
    with_usage: bool
    seeded: bool


@dataclass(frozen=True)
class EmbeddingQuestion:
    """The content of a request body for embeddings. `side`: "query" or "document", whose prompt the texts get.
    `dimensions`: how many numbers an embedding has; None: all."""

    name: str
    texts: tuple[str, ...]
    side: str
    dimensions: int | None
    is_base64: bool


def read_body(body: bytes, adapters: Adapters, max_tokens: int, *, is_chat: bool = True) -> ClientQuestion:
    """Read a request body. Raises: ProtocolError with the name of the invalid field."""
    value = body_fields(body, "chat" if is_chat else "completions")
    name = model_name(value.get("model"), adapters)
    requests = [_chat(value, max_tokens)] if is_chat else _completions(value)
    choices = whole_number(value, "n", 1, 1, MAX_CHOICES)
    if (count := choices * len(requests)) > MAX_JOBS:
        raise ProtocolError(
            400, f"{count} choices are more than {MAX_JOBS}, the maximum: send fewer prompts", "n", "invalid_value"
        )
    return ClientQuestion(
        name,
        tuple(_choice(request, number) for request, number in product(requests, range(choices))),
        choices,
        is_chat,
        stream=of_kind(value, "stream", bool, False),
        with_usage=_with_usage(of_kind(value, "stream_options", dict, {})),
        seeded=value.get("seed") is not None,
    )


def read_embedding_body(body: bytes, adapters: Adapters, width: int) -> EmbeddingQuestion:
    """Read a request body for embeddings of `width` numbers. Raises: ProtocolError with the name of the invalid
    field."""
    value = body_fields(body, "embeddings")
    given = value.get("input")
    wanted = "a text or a list of texts; token ids are not read"
    texts = check_texts(given if is_list(given) else [given], "input", wanted)
    return EmbeddingQuestion(
        model_name(value.get("model"), adapters),
        texts,
        _one_of(value, "prompt_name", ("document", "query")),
        None if value.get("dimensions") is None else whole_number(value, "dimensions", width, 1, width),
        _one_of(value, "encoding_format", ("float", "base64")) == "base64",
    )


def is_list(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def check_texts(texts: Sequence[object], field: str, wanted: str) -> tuple[str, ...]:
    """The texts. Raises: ProtocolError unless there are at least one and at most MAX_INPUTS texts."""
    checked = tuple(text for text in texts if isinstance(text, str))
    if not texts or len(checked) < len(texts):
        raise ProtocolError(400, f"'{field}' must be {wanted}", field, "invalid_value")
    if len(texts) > MAX_INPUTS:
        what = f"{len(texts)} texts are more than {MAX_INPUTS}, the maximum: send fewer texts"
        raise ProtocolError(400, what, field, "invalid_value")
    return checked


def _one_of(body: Body, field: str, names: Sequence[str]) -> str:
    """The value of a field; the first name if it is not set."""
    value = body.get(field)
    if value not in (None, *names):
        raise ProtocolError(400, f"'{field}' must be {' or '.join(names)}", field, "invalid_value")
    return names[0] if value is None else str(value)


def body_fields(body: bytes, endpoint: str) -> Body:
    """The fields of a request body. Raises: ProtocolError."""
    try:
        value = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ProtocolError(400, "the body must be a JSON object")
    _check_fields(value, endpoint)
    return value


def model_name(name: object, adapters: Adapters) -> str:
    """The name of the requested model. Raises: ProtocolError if there is no such model."""
    if isinstance(name, str) and adapters.knows(name):
        return name
    text = "'model' is required" if name is None else f"there is no model {name!r}"
    raise ProtocolError(404, f"{text}; there are: {adapters.listing}", "model", "model_not_found")


def _check_fields(body: Body, endpoint: str) -> None:
    """Raises: ProtocolError for an unknown field, or for a field whose value is not supported."""
    neutral = NEUTRAL_IN[endpoint]
    for field, content in body.items():
        if content is None:  # some clients send all fields of the API, and null for those that are not set
            continue
        if field not in READ[endpoint] and field not in WITHOUT_EFFECT and field not in neutral:
            raise ProtocolError(400, f"'{field}' is not a known field", field, "unknown_parameter")
        if field in neutral and content not in neutral[field]:
            raise ProtocolError(400, f"'{field}' is not supported", field, "unsupported_parameter")
        if field in WITHOUT_EFFECT:
            of_kind(body, field, WITHOUT_EFFECT[field], None)


def _no_number(text: str) -> object:
    raise ValueError(f"{text} is not a JSON value")


def _with_usage(options: Body) -> bool:
    """Whether the stream ends with the number of tokens. Raises: ProtocolError for an unknown option."""
    for name in options:
        if name not in ("include_usage", "include_obfuscation"):
            raise ProtocolError(400, f"'{name}' is not a known option", f"stream_options.{name}", "unknown_parameter")
        of_kind(options, name, bool, False, f"stream_options.{name}")
    return options.get("include_usage") is True


def _choice(request: Request, number: int) -> Request:
    """The request for choice `number`. Each choice has a different random seed; choice 0 has the request's own seed."""
    if not number:
        return request
    return replace(request, sampling=replace(request.sampling, seed=seed_for("choice", request.sampling.seed, number)))


def _chat(body: Body, max_tokens: int) -> Request:
    field = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    scored, top = of_kind(body, "logprobs", bool, False), whole_number(body, "top_logprobs", 0, 0, MAX_TOP)
    if top and not scored:
        raise ProtocolError(400, "'top_logprobs' needs 'logprobs': true", "top_logprobs", "invalid_value")
    return Request(
        _messages(body.get("messages")),
        whole_number(body, field, max_tokens, 1, 1_000_000),
        _sampling(body),
        _stop(body.get("stop")),
        tools=_tools(body),
        required=_required(body),
        single_call=not of_kind(body, "parallel_tool_calls", bool, True),
        schema=_schema(of_kind(body, "response_format", dict, {})),
        top=top if scored else None,
    )


def _completions(body: Body) -> list[Request]:
    """One request for each prompt."""
    logprobs = None if body.get("logprobs") is None else whole_number(body, "logprobs", 0, 0, MAX_TOP)
    request = Request(
        (),
        whole_number(body, "max_tokens", COMPLETION_TOKENS, 0, 1_000_000),
        _sampling(body),
        _stop(body.get("stop")),
        top=logprobs,
        echoes=of_kind(body, "echo", bool, False),
    )
    if not request.max_new_tokens and not request.echoes:
        raise ProtocolError(400, "'max_tokens' is 0, which needs 'echo': true", "max_tokens", "invalid_value")
    prompt = body.get("prompt")
    prompts = prompt if isinstance(prompt, list) and prompt and not _is_id(prompt[0]) else [prompt]
    if len({type(each) for each in prompts}) > 1:
        raise ProtocolError(400, "'prompt' mixes texts and token ids: send one kind", "prompt", "invalid_value")
    return [_with_prompt(request, each) for each in prompts]


def _with_prompt(request: Request, prompt: object) -> Request:
    if isinstance(prompt, str):
        return replace(request, text=prompt)
    if not isinstance(prompt, list) or not prompt or not all(map(_is_id, prompt)):
        raise ProtocolError(
            400,
            "'prompt' must be a text, a list of token ids, or a list of texts or of lists of token ids",
            "prompt",
            "invalid_value",
        )
    return replace(request, prompt=tuple(prompt))


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _required(body: Body) -> tuple[JsonObject, ...]:
    """The tools of which the answer must call one; empty if the model may decide."""
    choice = body.get("tool_choice")
    if choice in (None, "none", "auto"):
        return ()
    named = tool_name(choice) if isinstance(choice, dict) and choice.get("type") == "function" else None
    required = tuple(tool for tool in _tools(body) if choice == "required" or tool_name(tool) == named)
    if not required:
        what = "'tool_choice' must be none, auto, required or a function in 'tools'"
        raise ProtocolError(400, what, "tool_choice", "invalid_value")
    if _schema(of_kind(body, "response_format", dict, {})) is not None:
        what = "'tool_choice' requires a tool call, which has its own format: remove 'response_format'"
        raise ProtocolError(400, what, "response_format", "invalid_value")
    return required


def _tools(body: Body) -> tuple[JsonObject, ...]:
    """The tools whose definitions the model sees; none if the client sends tool_choice "none"."""
    choice = body.get("tool_choice")
    try:
        tools = read_tools(body.get("tools")) or ()
    except DataError as error:
        raise ProtocolError(400, str(error), "tools", "invalid_value") from None
    if not all(isinstance(tool_name(tool), str) for tool in tools):
        raise ProtocolError(400, "a tool needs a function with a name", "tools", "invalid_value")
    return () if choice == "none" else tools


def _schema(response_format: Body) -> JsonObject | None:
    """The JSON schema that the answer must follow; None for plain text. A json_object may contain a schema as `value`,
    as huggingface_hub's client sends it."""
    kind, stated = response_format.get("type", "text"), response_format.get("json_schema")
    if kind == "text":
        return None
    if kind == "json_object":
        schema = response_format.get("value", JSON_OBJECT)
    else:
        schema = stated.get("schema") if kind == "json_schema" and isinstance(stated, dict) else None
    if not isinstance(schema, dict):
        what = "'response_format' must have the type text, json_object, or json_schema with a schema"
        raise ProtocolError(400, what, "response_format", "invalid_value")
    return schema


def of_kind(body: Body, field: str, kind: type[T], default: T, spelled: str = "") -> T:
    value, name = body.get(field), spelled or field
    if value is not None and not isinstance(value, kind):
        raise ProtocolError(400, f"'{name}' must be {KINDS[kind]}", name, "invalid_value")
    return default if value is None else value


def _number(body: Body, field: str, default: float, low: float, high: float) -> float:
    number = body.get(field)
    if number is None:
        return default
    if isinstance(number, bool) or not isinstance(number, int | float) or not low <= number <= high:
        raise ProtocolError(400, f"'{field}' must be a number from {low:g} to {high:g}", field, "invalid_value")
    return number


def _sampling(body: Body) -> Sampling:
    """The sampling settings. If the client sends no seed, `seed` is 0 here, and the server draws a random seed
    later."""
    temperature, seed = _number(body, "temperature", 1.0, 0, 2), whole_number(body, "seed", 0, 0, 2**63 - 1)
    sampling = Sampling(
        float(temperature),
        float(_number(body, "top_p", 1.0, 1e-6, 1)),
        max(whole_number(body, "top_k", 0, -1, 2**31), 0),  # vLLM writes -1 for all tokens
        seed if temperature else 0,
        **{name: float(_number(body, name, default, *limits)) for name, (default, *limits) in PENALTIES.items()},
        logit_bias=_logit_bias(of_kind(body, "logit_bias", dict, {})),
    )
    return sampling if temperature or sampling.changes_logits else GREEDY


def _logit_bias(biases: Body) -> tuple[tuple[int, float], ...]:
    if len(biases) > MAX_BIASES or not all(name.isascii() and name.isdecimal() for name in biases):
        what = f"'logit_bias' must be an object of up to {MAX_BIASES} token ids and numbers"
        raise ProtocolError(400, what, "logit_bias", "invalid_value")
    return tuple((int(name), float(_number(biases, name, 0.0, -100, 100))) for name in biases)


def whole_number(body: Body, field: str, default: int, low: int, high: int) -> int:
    number = _number(body, field, default, low, high)
    if number != int(number):
        raise ProtocolError(400, f"'{field}' must be a whole number", field, "invalid_value")
    return int(number)


def _stop(stops: object) -> tuple[str, ...]:
    texts = [] if stops is None else [stops] if isinstance(stops, str) else stops
    if (
        not isinstance(texts, list)
        or len(texts) > MAX_STOPS
        or not all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_LENGTH for text in texts)
    ):
        what = f"'stop' must be a text or up to {MAX_STOPS} texts, each with 1 to {MAX_STOP_LENGTH} characters"
        raise ProtocolError(400, what, "stop", "invalid_value")
    return tuple(texts)


def _messages(messages: object) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages:
        raise ProtocolError(400, "'messages' must be a list with one message or more", "messages", "invalid_value")
    return tuple(_message(item, f"messages.{at}") for at, item in enumerate(messages))


def _message(item: object, place: str) -> Message:
    if not isinstance(item, dict) or item.get("role") not in ROLES:
        raise ProtocolError(400, f"a message needs a role, one of {', '.join(ROLES)}", f"{place}.role", "invalid_value")
    content = item.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise ProtocolError(
                400, "all parts of a message must have the type text", f"{place}.content", "invalid_value"
            )
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
