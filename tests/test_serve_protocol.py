"""Every field of OpenAI's API that `tunekit serve` reads, sent by the openai client."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.talking.test_tools import HERMES, TOOLS
from tests.test_serve import ask, client, running
from tests.test_serve import folders as folders
from tunekit.serve import make_app, make_server
from tunekit.talking.answer import Reply
from tunekit.talking.conversation import Speaker, make_speaker
from tunekit.talking.desk import Desk
from tunekit.targets.target import find_target, load_target

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
QUESTION, PROMPT = "Say something long, please.", "Once upon a time"


@pytest.fixture(scope="module")
def speaker(tiny_llama: Path, folders: Path) -> Speaker:
    target = load_target(find_target(str(tiny_llama), None, ["model.dtype=float32"]), torch.device("cpu"))
    speaker = make_speaker(target)
    speaker.template.text = HERMES
    speaker.adapters.add_folder(str(folders))
    speaker.adapters.load("one")  # before the desk's thread, which alone may load adapters
    return speaker


@pytest.fixture(scope="module")
def api(speaker: Speaker) -> Iterator[Any]:
    desk = Desk(speaker, 4, 512)
    with running(make_server(desk, make_app(desk, None, 16))) as port:
        yield client(port)
    desk.close()


def chat(api: Any, **more: Any) -> Any:
    return ask(api, "one", QUESTION, **more)


def complete(api: Any, prompt: Any = PROMPT, **more: Any) -> Any:
    return api.completions.create(**{"model": "one", "prompt": prompt, "temperature": 0, "max_tokens": 8, **more})


def test_n_choices_of_one_prompt(api: Any) -> None:
    """The first choice is that of n=1; greedy choices are equal; the prompt counts once."""
    several = chat(api, n=3, temperature=1.5, seed=4)
    texts = [choice.message.content for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    single = chat(api, temperature=1.5, seed=4)
    assert texts[0] == single.choices[0].message.content
    assert len(set(texts)) == 3
    assert several.usage.prompt_tokens == single.usage.prompt_tokens
    assert len({choice.message.content for choice in chat(api, n=2).choices}) == 1
    streamed = dict.fromkeys(range(3), "")
    for event in chat(api, n=3, temperature=1.5, seed=4, stream=True):
        for choice in event.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert list(streamed.values()) == texts


def logprobs_of(speaker: Speaker, ids: list[int]) -> torch.Tensor:
    """(T, V): the model's own log-probabilities, without a cache."""
    with torch.no_grad(), speaker.adapters.using("one"):
        logits = speaker.target.model.base.net(input_ids=torch.tensor([ids])).logits[0]
    return logits.double().log_softmax(-1)


def test_logprobs_of_a_chat(api: Any, speaker: Speaker) -> None:
    reply = chat(api, logprobs=True, top_logprobs=3)
    content, text = reply.choices[0].logprobs.content, reply.choices[0].message.content
    assert b"".join(bytes(token.bytes) for token in content).decode("utf-8", "replace") == text
    assert len(content) == reply.usage.completion_tokens
    assert all(token.top_logprobs[0].logprob == token.logprob for token in content)
    assert all(len(token.top_logprobs) == 3 for token in content)
    events = [event.choices[0] for event in chat(api, logprobs=True, top_logprobs=3, stream=True)]
    streamed = [token for event in events if event.logprobs for token in event.logprobs.content]
    assert [token.bytes for token in streamed] == [token.bytes for token in content]
    for one, two in zip(streamed, content, strict=True):  # the second answer reuses keys and values of the first
        assert math.isclose(one.logprob, two.logprob, abs_tol=1e-4)
    assert chat(api).choices[0].logprobs is None


def test_a_stop_text_ends_text_and_logprobs(api: Any) -> None:
    text = chat(api).choices[0].message.content
    stop = text[5:8]
    reply = chat(api, stop=[stop], logprobs=True).choices[0]
    assert reply.message.content == text[: text.index(stop)]
    assert reply.finish_reason == "stop"
    written = b"".join(bytes(token.bytes) for token in reply.logprobs.content).decode("utf-8", "replace")
    assert written.startswith(reply.message.content)
    assert len(written) < len(text)


def test_completions_with_echo_score_the_prompt(api: Any, speaker: Speaker) -> None:
    """As the model's own forward does, for a text, for ids, and for several prompts; nothing is generated."""
    ids = speaker.target.tokenizer.encode(PROMPT)
    expected = logprobs_of(speaker, ids)
    for prompt in (PROMPT, ids, [PROMPT, PROMPT], [ids, ids]):
        reply = complete(api, prompt, echo=True, logprobs=2, max_tokens=0)
        assert len(reply.choices) == (2 if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1)
        for choice in reply.choices:
            assert choice.text == PROMPT
            assert choice.logprobs.token_logprobs[0] is None
            for place, logprob in enumerate(choice.logprobs.token_logprobs[1:]):
                assert math.isclose(logprob, expected[place, ids[place + 1]], abs_tol=1e-5)
                best = max(choice.logprobs.top_logprobs[place + 1].values())
                assert math.isclose(best, expected[place].max(), abs_tol=1e-5)
            starts = choice.logprobs.text_offset
            assert [PROMPT[at : at + len(token)] for at, token in zip(starts, choice.logprobs.tokens, strict=True)] == (
                choice.logprobs.tokens
            )
        assert reply.usage.completion_tokens == 0
    full = complete(api, [5] * 512, echo=True, logprobs=0, max_tokens=0).choices[0]
    assert len(full.logprobs.tokens) == 512
    longer = complete(api, echo=True, logprobs=0, max_tokens=3).choices[0]
    assert longer.text.startswith(PROMPT)
    assert len(longer.logprobs.tokens) == len(ids) + 3


def test_completions_continue_the_text(api: Any) -> None:
    text = complete(api).choices[0].text
    assert complete(api, echo=True).choices[0].text == PROMPT + text
    without_effect = {"messages": None, "reasoning_effort": None, "prompt_cache_key": "x", "safety_identifier": "x"}
    assert complete(api, extra_body=without_effect).choices[0].text == text
    events = [event.choices[0] for event in complete(api, echo=True, stream=True, logprobs=1)]
    assert "".join(event.text for event in events) == PROMPT + text
    assert events[-1].finish_reason == "length"
    offsets = [at for event in events if event.logprobs for at in event.logprobs.text_offset]
    assert offsets == complete(api, echo=True, logprobs=1).choices[0].logprobs.text_offset
    several = complete(api, [PROMPT, "Yes"], n=2, temperature=1, seed=3)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == complete(api, temperature=1, seed=3).choices[0].text
    assert complete(api, "Yes", temperature=1, seed=3).choices[0].text == several.choices[2].text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"suffix": "end"}, "'suffix' is not supported"),
        ({"best_of": 2}, "'best_of' is not supported"),
        ({"max_tokens": 0}, "which needs 'echo'"),
        ({"prompt": []}, "'prompt' must be"),
        ({"prompt": [["x"]]}, "'prompt' must be"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": [10**6]}, "ids that are not in the vocabulary"),
        ({"prompt": [-1]}, "ids that are not in the vocabulary"),
        ({"prompt": "x" * 900}, "reads at most 512"),
        ({"prompt": ["x"] * 97, "n": 2}, "194 choices are more than 192, the maximum"),
        ({"prompt": [5] * 512}, "leave no room for an answer"),
        ({"seed": 0.5}, "'seed' must be a whole number"),
        ({"logprobs": 21}, "'logprobs' must be a number from 0 to 20"),
        ({"extra_body": {"messages": []}}, "'messages' is not a known field"),
    ],
)
def test_wrong_completions_are_refused(api: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        complete(api, **more)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "big": {"type": "boolean"}},
    "required": ["name", "big"],
    "additionalProperties": False,
    "x-origin": "an unknown keyword is ignored",
}


def test_an_answer_follows_a_schema(api: Any) -> None:
    """A random model writes no JSON by itself. Other requests run at the same time and are not constrained."""
    pytest.importorskip("llguidance")
    stated = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        reply = chat(api, response_format=stated, max_tokens=200, temperature=1, seed=seed, n=2)
        for choice in reply.choices:
            value = json.loads(choice.message.content)
            assert set(value) == {"name", "big"}
            assert isinstance(value["big"], bool)
            assert choice.finish_reason == "stop"
    text = chat(api, response_format={"type": "json_object"}, max_tokens=30).choices[0].message.content
    assert text.startswith("{")
    deep: dict[str, Any] = {}
    for _ in range(200):
        deep = {"properties": {"a": deep}}
    wrong = [({"type": "strange"}, "Invalid type"), ({"if": {}}, "Unimplemented keys"), (deep, "recursion limit")]
    for schema, message in wrong:
        stated["json_schema"]["schema"] = schema  # type: ignore[index]
        with pytest.raises(openai.BadRequestError, match=message):
            chat(api, response_format=stated)


def test_without_its_library_a_schema_is_refused(api: Any, monkeypatch: pytest.MonkeyPatch, speaker: Speaker) -> None:
    vars(speaker.template).pop("grammars", None)
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(openai.BadRequestError, match="needs llguidance"):
        chat(api, response_format={"type": "json_object"})


def test_tools_are_in_the_prompt_and_calls_in_the_answer(
    api: Any, monkeypatch: pytest.MonkeyPatch, speaker: Speaker
) -> None:
    plain = chat(api).usage.prompt_tokens
    reply = chat(api, tools=TOOLS)
    assert reply.usage.prompt_tokens > plain + 10
    assert (reply.choices[0].message.tool_calls, reply.choices[0].finish_reason) == (None, "length")
    assert chat(api, tools=TOOLS, tool_choice="none").usage.prompt_tokens == plain
    call = '<tool_call>{"name": "weather", "arguments": {"place": "Ulm"}}</tool_call>'
    monkeypatch.setattr(type(speaker.target.tokenizer), "decode", lambda self, ids, **_: call[: 20 * len(ids)])
    choice = chat(api, tools=TOOLS).choices[0]
    assert not chat(api, tools=TOOLS, parallel_tool_calls=False).choices[0].message.content
    (found,) = choice.message.tool_calls
    assert (found.function.name, json.loads(found.function.arguments)) == ("weather", {"place": "Ulm"})
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    events = [event.choices[0] for event in chat(api, tools=TOOLS, stream=True)]
    assert [event.delta.tool_calls[0].function.name for event in events if event.delta.tool_calls] == ["weather"]
    assert "".join(event.delta.content or "" for event in events) == ""
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [found.model_dump()]}]
    turns.append({"role": "tool", "tool_call_id": found.id, "content": "sunny"})
    assert chat(api, messages=turns, tools=TOOLS).usage.prompt_tokens > reply.usage.prompt_tokens


def test_a_reply_of_a_tool_call_keeps_its_text() -> None:
    from tunekit.talking.choices import ChatForm

    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = ChatForm(False).choice(Reply("Let me see.", 1, 9, "tool_calls", (), (call,)))["message"]
    assert (message["content"], message["tool_calls"]) == ("Let me see.", [call])
