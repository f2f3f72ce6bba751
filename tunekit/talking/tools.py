"""Finds tool calls in answers. The model writes them in the format of its chat template."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from tunekit.basics import JsonObject
from tunekit.contracts import Tokenizer
from tunekit.errors import DataError

NAME, ARGUMENTS = "get_the_time", {"place": "Ulm"}
QUESTION = {"role": "user", "content": "What time is it?"}
CALL = {"type": "function", "id": "call00001", "function": {"name": NAME, "arguments": ARGUMENTS}}
DEFINITIONS = ("$defs", "definitions")  # schemas to which others refer
ARGUMENT_KEYS = ("arguments", "parameters")


@dataclass(frozen=True)
class ToolFormat:
    """The format of a tool call: a JSON object between `prefix` and `suffix`. It contains the function's name, and its
    arguments under `key`.

    If `prefix` is empty, the object is a tool call only at the start of an answer.
    """

    prefix: str
    suffix: str
    key: str

    def schema(self, tool: JsonObject) -> JsonObject:
        """The JSON schema of a call of this tool."""
        stated = tool["function"].get("parameters")
        arguments = {**(stated if isinstance(stated, dict) else {}), "type": "object"}
        shared = {name: arguments.pop(name) for name in DEFINITIONS if name in arguments}  # $ref starts at the root
        properties = {"name": {"const": tool_name(tool)}, self.key: arguments}
        call = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
        return call | shared

    def start(self, text: str) -> int:
        """The index in the text at which tool calls start, or might start; the length of the text if there is no tool
        call."""
        if not self.prefix:
            return 0 if text.lstrip()[:1] in ("", "{") else len(text)
        if self.prefix in text:
            return text.index(self.prefix)
        sizes = range(min(len(self.prefix) - 1, len(text)), 0, -1)
        return len(text) - next((size for size in sizes if text.endswith(self.prefix[:size])), 0)

    def read(self, text: str, tools: Sequence[JsonObject]) -> tuple[JsonObject, ...]:
        """The tool calls in a text, in the format of OpenAI's API. Empty if the text contains anything other than
        calls of `tools`."""
        names, text, calls = [tool_name(tool) for tool in tools], text.strip(), []
        while text:
            try:
                value, end = json.JSONDecoder().raw_decode(text.removeprefix(self.prefix).lstrip())
            except (ValueError, RecursionError):
                return ()
            after = text.removeprefix(self.prefix).lstrip()[end:].lstrip()
            if not text.startswith(self.prefix) or not after.startswith(self.suffix) or not self._is_call(value, names):
                return ()
            function = {"name": value["name"], "arguments": json.dumps(value[self.key], ensure_ascii=False)}
            calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
            text = after.removeprefix(self.suffix).lstrip()
        return tuple(calls)

    def _is_call(self, value: object, names: Sequence[object]) -> bool:
        return isinstance(value, dict) and value.get("name") in names and isinstance(value.get(self.key), dict)


def tool_name(tool: JsonObject) -> object:
    """The name of the function in a tool's definition; None if it has no name."""
    function = tool.get("function")
    return function.get("name") if isinstance(function, dict) else None


def reads_tools(template: str | None) -> bool:
    """Whether a chat template puts definitions of tools into the prompt."""
    return template is not None and re.search(r"\btools\b", template) is not None


def find_tool_format(tokenizer: Tokenizer, template: str | None = None) -> ToolFormat | None:
    """The format in which the template writes a tool call of the assistant; None if the template does not write
    JSON."""
    turn = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    try:
        before = tokenizer.render([QUESTION], add_generation_prompt=True, template=template)
        text = tokenizer.render([QUESTION, turn], template=template)
    except DataError:
        return None
    text = text.removeprefix(before) if text.startswith(before) else text.rpartition(QUESTION["content"])[2]
    for brace in re.finditer("{", text):
        try:
            value, end = json.JSONDecoder().raw_decode(text, brace.start())
        except ValueError:
            continue
        if isinstance(value, dict) and value.get("name") == NAME:
            key = next((key for key in ARGUMENT_KEYS if value.get(key) == ARGUMENTS), None)
            prefix, suffix = (_answer_text(tokenizer, part) for part in (text[: brace.start()], text[end:]))
            return None if key is None or prefix == "[" else ToolFormat(prefix, suffix, key)
    return None


def _answer_text(tokenizer: Tokenizer, text: str) -> str:
    """A text of the template without its special tokens, as an answer would contain it."""
    return tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True).strip()
