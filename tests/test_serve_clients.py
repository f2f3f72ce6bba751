"""Clients of `tunekit serve`: every helper of the openai client, huggingface_hub's client, and the program `llm`."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from tests.talking.test_conversation import load
from tests.talking.test_tools import LLAMA
from tests.test_serve import ask, client, running
from tests.test_serve import folders as folders
from tunekit.errors import InputError
from tunekit.formats.example import Message
from tunekit.serve import make_app, make_server
from tunekit.talking import desk as desk_module
from tunekit.talking.answer import Request
from tunekit.talking.conversation import Speaker, make_speaker
from tunekit.talking.desk import Desk
from tunekit.talking.tools import ToolFormat

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("llguidance")
LLM = Path(os.environ.get("TUNEKIT_PROGRAMS", "/nowhere")) / "llm"
QUESTION = "Say something long, please."
MESSAGES = [{"role": "user", "content": QUESTION}]


class Weather(BaseModel):
    """The form of an answer."""

    place: Literal["Ulm", "Rome"]
    days: Literal[1, 2, 3]


class Go(BaseModel):
    """Arguments of a function; short, because the tiny model has 512 positions."""

    n: Literal[1, 2]


class Call(BaseModel):
    """A tool call as the template writes it, so that a random model makes one."""

    name: Literal["Go"]
    parameters: Go


def schema_of(model: type[BaseModel]) -> Any:
    return openai.lib._parsing._completions.type_to_response_format_param(model)


@pytest.fixture(scope="module")
def speaker(tiny_llama: Path, folders: Path) -> Speaker:
    speaker = make_speaker(load(tiny_llama))
    speaker.template.text = LLAMA
    speaker.adapters.add_folder(str(folders))
    return speaker


@pytest.fixture(scope="module")
def port(speaker: Speaker) -> Iterator[int]:
    desk = Desk(speaker, 4, 512)
    with running(make_server(desk, make_app(desk, "secret", 16))) as port:
        yield port
    desk.close()


@pytest.fixture(scope="module")
def api(port: int) -> Any:
    return client(port, "secret")


def test_models_are_listed_and_retrieved(api: Any) -> None:
    assert [model.id for model in api.models.list()] == ["base", "one", "two"]
    assert api.models.retrieve("two").id == "two"
    with pytest.raises(openai.NotFoundError) as caught:
        api.models.retrieve("three")
    assert caught.value.code == "model_not_found"


@pytest.mark.drawn
def test_an_answer_is_parsed_into_a_class(api: Any) -> None:
    settings = {"model": "one", "messages": MESSAGES, "response_format": Weather, "temperature": 1.0, "max_tokens": 60}
    values = [api.chat.completions.parse(**settings, seed=seed).choices[0].message.parsed for seed in range(6)]
    assert all(isinstance(value, Weather) for value in values)
    assert len({value.model_dump_json() for value in values}) > 1
    with api.chat.completions.stream(**settings, seed=0) as stream:
        texts = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion().choices[0].message
    assert final.parsed == values[0]
    assert "".join(texts) == final.content


@pytest.mark.drawn
def test_json_without_a_schema(api: Any) -> None:
    """An answer that ended by itself is a JSON object; one that was cut begins like one."""
    settings: dict[str, Any] = {"response_format": {"type": "json_object"}, "temperature": 1.0, "max_tokens": 30}
    ended = 0
    for seed in range(8):
        choice = ask(api, "base", QUESTION, **settings, seed=seed).choices[0]
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            ended += 1
            assert isinstance(json.loads(choice.message.content), dict)
    assert ended


@pytest.mark.drawn
def test_a_tool_is_called_and_its_result_is_read(api: Any) -> None:
    """The schema makes the random model write a call; streamed and complete calls are equal."""
    tools = [openai.pydantic_function_tool(Go)]
    settings = {"tools": tools, "tool_choice": "auto", "response_format": schema_of(Call), "max_tokens": 150}
    choice = ask(api, "one", QUESTION, **settings).choices[0]
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content, call.function.name) == ("tool_calls", None, "Go")
    arguments = Go.model_validate_json(call.function.arguments)
    streamed = [event.choices[0].delta.tool_calls for event in ask(api, "one", QUESTION, **settings, stream=True)]
    assert [json.loads(part.function.arguments) for parts in streamed if parts for part in parts] == [
        arguments.model_dump()
    ]
    parsed = api.chat.completions.parse(model="one", messages=MESSAGES, temperature=0, **settings)
    assert parsed.choices[0].message.tool_calls[0].function.parsed_arguments == arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    turns = [*MESSAGES, choice.message.model_dump(exclude_none=True), result]
    assert ask(api, "one", QUESTION, messages=turns).choices[0].message.content
    settings["tool_choice"] = "none"
    assert ask(api, "one", QUESTION, **settings).choices[0].message.tool_calls is None


NUMBER = {"enum": [1, 2]}
STRICT = {"required": ["n"], "additionalProperties": False}
PARAMETERS = {
    "Go": {"properties": {"n": NUMBER}, **STRICT},
    "Plan": {"properties": {"n": {"$ref": "#/$defs/N"}}, "$defs": {"N": NUMBER}, **STRICT},
}


@pytest.mark.drawn
@pytest.mark.parametrize("form", [ToolFormat("", "", "parameters"), ToolFormat("<call>", "</call>", "arguments")])
def test_a_call_is_required(api: Any, speaker: Speaker, monkeypatch: pytest.MonkeyPatch, form: ToolFormat) -> None:
    """The random model then writes a complete call of the chosen function, or of any."""
    monkeypatch.setitem(vars(speaker.template), "tool_format", form)
    tools = [{"type": "function", "function": {"name": name, "parameters": it}} for name, it in PARAMETERS.items()]
    settings: dict[str, Any] = {"tools": tools, "max_tokens": 80}
    for chosen in ("Go", "Plan", "required"):
        settings["tool_choice"] = (
            "required" if chosen == "required" else {"type": "function", "function": {"name": chosen}}
        )
        choice = ask(api, "one", "x", **settings).choices[0]
        (call,) = choice.message.tool_calls
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        assert call.function.name in ((chosen,) if chosen in PARAMETERS else PARAMETERS)
        assert json.loads(call.function.arguments)["n"] in (1, 2)
    with pytest.raises(openai.BadRequestError, match="remove 'response_format'"):
        ask(api, "one", QUESTION, **settings, response_format={"type": "json_object"})


def test_a_template_without_json_calls_cannot_require_one(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(speaker.template), "tool_format", None)
    tools = [openai.pydantic_function_tool(Go)]
    with pytest.raises(InputError, match="does not write tool calls as JSON"):
        speaker.prepare(Request([Message("user", QUESTION)], tools=tools, required=tools))


@pytest.mark.drawn
def test_the_asynchronous_client_asks_at_once(api: Any, port: int) -> None:
    expected = [ask(api, name, QUESTION).choices[0].message.content for name in ("base", "one", "two")]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret") as other:
            asked = {"messages": MESSAGES, "temperature": 0}
            texts = [other.chat.completions.create(model=name, **asked) for name in ("base", "one", "two")]
            stream = await other.chat.completions.create(model="one", **asked, stream=True)
            replies = await asyncio.gather(*texts)
            streamed = "".join([event.choices[0].delta.content or "" async for event in stream])
            assert streamed == replies[1].choices[0].message.content
            return [reply.choices[0].message.content for reply in replies]

    assert asyncio.run(together()) == expected


@pytest.mark.drawn
def test_a_stream_that_is_closed_ends_its_answer(api: Any, speaker: Speaker) -> None:
    forwards: list[int] = []
    hook = speaker.target.model.base.net.register_forward_hook(lambda *_: forwards.append(1))
    for create in (api.chat.completions.create, api.completions.create):
        prompt = {"prompt": "x"} if create == api.completions.create else {"messages": MESSAGES}
        stream = create(model="base", **prompt, stream=True, max_tokens=450, seed=1, n=2)
        next(iter(stream))
        stream.close()
        assert settles(forwards)
    hook.remove()
    assert len(forwards) < 2 * 440
    assert ask(api, "two", QUESTION).choices


def settles(forwards: list[int]) -> bool:
    """Whether the forwards end."""
    for _ in range(200):
        count = len(forwards)
        time.sleep(0.1)
        if len(forwards) == count:
            return True
    return False


ERRORS: dict[str, tuple[Callable[[Any], Any], type[Exception], int]] = {
    "wrong key": (lambda api: api.with_options(api_key="x").models.list(), openai.AuthenticationError, 401),
    "unknown model": (lambda api: ask(api, "three", "x"), openai.NotFoundError, 404),
    "unknown place": (lambda api: api.embeddings.create(model="one", input="x"), openai.NotFoundError, 404),
    "wrong value": (lambda api: ask(api, "one", "x", temperature=9), openai.BadRequestError, 400),
    "foreign host": (
        lambda api: ask(api, "one", "x", extra_headers={"Host": "example.org"}),
        openai.PermissionDeniedError,
        403,
    ),
    "too large": (lambda api: ask(api, "one", "x" * 5_000_000), openai.APIStatusError, 413),
    "other body": (
        lambda api: ask(api, "one", "x", extra_headers={"Content-Type": "text/plain"}),
        openai.APIStatusError,
        415,
    ),
    "call is required": (lambda api: ask(api, "one", "x", tool_choice="required"), openai.BadRequestError, 400),
}


@pytest.mark.parametrize("name", ERRORS)
def test_each_error_has_its_status(api: Any, name: str) -> None:
    call, kind, status = ERRORS[name]
    with pytest.raises(kind) as caught:
        call(api)
    assert caught.value.status_code == status  # type: ignore[attr-defined]
    assert caught.value.body["message"]  # type: ignore[attr-defined]


def test_a_full_server_is_busy(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk_module, "MAX_JOBS", 1)
    with pytest.raises(openai.InternalServerError) as caught:
        ask(api, "one", "x", n=2)
    assert caught.value.status_code == 503


def test_huggingface_hubs_client(api: Any, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its own code for requests and streams, and refuses even this machine where HF_HUB_OFFLINE is set."""
    from huggingface_hub import InferenceClient, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    other = InferenceClient(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret")
    expected = ask(api, "one", QUESTION, logprobs=True, top_logprobs=2).choices[0]
    asked = {"model": "one", "messages": MESSAGES, "temperature": 0}
    reply = other.chat_completion(**asked, logprobs=True, top_logprobs=2).choices[0]
    assert reply.message.content == expected.message.content
    tokens = [token.token for token in reply.logprobs.content]
    assert tokens == [token.token for token in expected.logprobs.content]
    events = other.chat_completion(**asked, stream=True)
    assert "".join(event.choices[0].delta.content or "" for event in events) == expected.message.content
    stated = schema_of(Weather)
    text = other.chat_completion(**asked, response_format=stated, max_tokens=60).choices[0].message.content
    assert Weather.model_validate_json(text)


@pytest.mark.slow
@pytest.mark.skipif(not LLM.is_dir(), reason="TUNEKIT_PROGRAMS has no llm")
@pytest.mark.parametrize("streams", [True, False])
def test_the_program_llm(api: Any, port: int, tmp_path: Path, streams: bool) -> None:
    model = {"model_id": "served", "model_name": "one", "api_base": f"http://127.0.0.1:{port}/v1"}
    entry = {**model, "supports_schema": True, "can_stream": streams, "api_key_name": "served"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([entry]), "utf-8")
    environment = os.environ | {"PYTHONPATH": str(LLM), "LLM_USER_PATH": str(tmp_path)}

    def answer(*words: str) -> str:
        command = [
            sys.executable,
            "-m",
            "llm",
            "-m",
            "served",
            "--key",
            "secret",
            "-o",
            "temperature",
            "0",
            *words,
            QUESTION,
        ]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    assert answer("-o", "max_tokens", "16").strip() == ask(api, "one", QUESTION).choices[0].message.content.strip()
    schema = json.dumps(Weather.model_json_schema())
    assert Weather.model_validate_json(answer("-o", "max_tokens", "60", "--schema", schema))
