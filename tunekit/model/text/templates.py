"""Applies chat templates, which are untrusted code, in transformers' sandbox, with limits on time and memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from tunekit.errors import DataError
from tunekit.machine.memory import address_space_limit
from tunekit.machine.signals import TimeUp, time_limit
from tunekit.model.transformers_guard import replaced
from tunekit.records import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "data.chat_template"
SIMPLER = "name a simpler template in data.chat_template"
REPAIR = "repair the row, or name a different template in data.chat_template"
LIMIT_SECONDS = 5.0
LIMIT_CHARACTERS = 50_000_000
LIMIT_EXTRA_BYTES = 2 * 2**30
# With today's date, a template would encode rows differently tomorrow. This day is Llama 3's default.
FIXED_DAY = datetime(2024, 7, 26)


class _Refusal(Exception):
    """The template raised an error. The text is the template's message."""


Messages = Sequence[JsonObject]


def render_template(
    native: PreTrainedTokenizerBase,
    template: str,
    messages: Messages,
    tools: Sequence[JsonObject] | None,
    add_generation_prompt: bool,
) -> str:
    """Apply the template to messages. Their content is text, and the arguments of tool calls are JSON objects.

    If the template cannot read these, it is tried with other forms: the content as a list of text parts, and the
    arguments as JSON text.
    Raises: DataError if the template refuses the messages, is invalid, takes too long or writes too much.
    """
    render = partial(
        native.apply_chat_template,
        tools=None if tools is None else list(tools),
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
    )
    parts = [_with_parts(message) for message in messages]
    forms = [messages, parts, *([_with_text_arguments(message) for message in form] for form in (messages, parts))]
    texts: list[str] = []
    refusals: list[_Refusal] = []
    for number, form in enumerate(forms):
        if form in forms[:number]:
            continue
        try:
            texts.append(_apply(render, template, form))
        except _Refusal as refusal:
            refusals.append(refusal)
            continue
        if _has_contents(messages, texts[-1]):
            return texts[-1]
    if not texts:
        raise DataError(f"the chat template refused the row: {refusals[0]}", REPAIR, key=KEY) from refusals[0]
    return texts[0]


def _has_contents(messages: Messages, text: str) -> bool:
    """Whether the rendered text contains the content of a message, and no arguments printed as a Python dict."""
    contents = [message["content"].strip() for message in messages if isinstance(message.get("content"), str)]
    objects = [call["function"]["arguments"] for message in messages for call in message.get("tool_calls", ())]
    printed = any(part and isinstance(part, dict) and str(part) in text for part in objects)
    return not printed and (not any(contents) or any(content and content in text for content in contents))


def _with_parts(message: JsonObject) -> JsonObject:
    content = message.get("content")
    return message if not isinstance(content, str) else {**message, "content": [{"type": "text", "text": content}]}


def _with_text_arguments(message: JsonObject) -> JsonObject:
    calls = []
    for call in message.get("tool_calls", ()):
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({"type": "function", **call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls} if calls else message


def _apply(render: Callable[[list[JsonObject]], str], template: str, messages: Messages) -> str:
    """Apply the template to messages in one form, with limits on time and memory."""
    try:
        with address_space_limit(LIMIT_EXTRA_BYTES), time_limit(LIMIT_SECONDS), _fixed_day(template):
            text = render(list(messages))
    except TimeUp as error:
        raise DataError(f"the chat template took more than {LIMIT_SECONDS:g} seconds", SIMPLER, key=KEY) from error
    except MemoryError as error:
        raise DataError("the chat template asked for too much memory", SIMPLER, key=KEY) from error
    except RecursionError as error:
        raise DataError("the chat template or the row is nested too deeply", SIMPLER, key=KEY) from error
    except Exception as error:  # a template may raise anything
        raise _Refusal(str(error).strip() or type(error).__name__) from error
    if len(text) > LIMIT_CHARACTERS:
        raise DataError(
            f"the chat template wrote {len(text)} characters, more than {LIMIT_CHARACTERS}", SIMPLER, key=KEY
        )
    return text


def _fixed_day(template: str) -> AbstractContextManager[None]:
    """Context manager: the template's function strftime_now returns a fixed day, so that rows do not change
    tomorrow."""
    from transformers.utils import chat_template_utils

    compile_template: Callable[[str], Any] | None = getattr(chat_template_utils, "_compile_jinja_template", None)
    if compile_template is None or "strftime_now" not in template:
        return nullcontext()
    return replaced(compile_template(template).environment.globals, strftime_now=FIXED_DAY.strftime)
