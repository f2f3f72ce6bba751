"""Tool calls as chat templates write them, read back from answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.talking.test_conversation import load
from tunekit.talking.answer import AnswerWriter, Request
from tunekit.talking.tools import ToolFormat, find_tool_format, reads_tools

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
HERMES = """{%- if tools %}{{ tools | tojson }}{% endif -%}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}
<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA = (
    HERMES.replace("\n<tool_call>\n", "")
    .replace("\n</tool_call>", "")
    .replace(
        "{{ call.function | tojson }}",
        """{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}""",
    )
)
HERMES_FORM = ToolFormat("<tool_call>", "</tool_call>", "arguments")
PYTHON = HERMES.replace("{{ call.function | tojson }}", "{{ call.function.name }}()")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (HERMES, HERMES_FORM),
        (LLAMA, ToolFormat("", "", "parameters")),
        (PYTHON, None),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
    ],
)
def test_the_form_is_found_in_the_template(tiny_llama: Path, template: str, expected: ToolFormat | None) -> None:
    assert find_tool_format(load(tiny_llama).tokenizer, template) == expected


def test_a_stop_text_after_a_call_leaves_the_call_out_of_the_text() -> None:
    text = 'Hm <tool_call>{"name": "weather", "arguments": {}}</tool_call>\n\nmore'
    pieces, reply = written(text, HERMES_FORM, stop=["\n\n"])
    assert ("".join(pieces), reply.text, reply.reason, len(reply.calls)) == ("Hm ", "Hm ", "tool_calls", 1)


def test_without_parallel_calls_there_is_one() -> None:
    text = '<tool_call>{"name": "weather", "arguments": {}}</tool_call>' * 2
    assert [len(written(text, HERMES_FORM, single_call=single)[1].calls) for single in (False, True)] == [2, 1]


def test_only_templates_with_tools_read_them() -> None:
    assert [reads_tools(text) for text in (HERMES, "{{ toolset }}", None)] == [True, False, False]


def written(text: str, shape: ToolFormat, size: int = 3, **more: Any) -> tuple[list[str], Any]:
    """The pieces of an answer that arrives a few characters at a time."""
    request = Request(max_new_tokens=999, tools=TOOLS, tool_format=shape, **more)
    writer, pieces = AnswerWriter(lambda ids, **_: text[: size * len(ids)], request), list[str]()
    while not writer.ended and size * len(writer.ids) < len(text):
        pieces.append(writer.add(1).text)
    return [piece for piece in [*pieces, writer.finish().text] if piece], writer.reply()


CALL = '{"name": "weather", "arguments": {"place": "Ulm {x}"}}'


@pytest.mark.parametrize(
    ("text", "content", "count"),
    [
        (f"<tool_call>\n{CALL}\n</tool_call>", "", 1),
        (f"Let me see.<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "Let me see.", 2),
        (f"<tool_call>{CALL}", None, 0),
        (f"<tool_call>{CALL.replace('weather', 'other')}</tool_call>", None, 0),
        (f"<tool_call>{CALL}</tool_call> and more", None, 0),
        ("<tool_call>[1]</tool_call>", None, 0),
        ("a < b and <tool", None, 0),
    ],
)
def test_calls_are_read_and_anything_else_stays_text(text: str, content: str | None, count: int) -> None:
    pieces, reply = written(text, ToolFormat("<tool_call>", "</tool_call>", "arguments"))
    assert "".join(pieces) == reply.text == (text if content is None else content)
    assert [json.loads(call["function"]["arguments"]) for call in reply.calls] == [{"place": "Ulm {x}"}] * count
    assert len({call["id"] for call in reply.calls}) == count
    assert (reply.reason == "tool_calls") == bool(count)


def test_without_a_prefix_only_a_complete_object_is_a_call() -> None:
    shape = ToolFormat("", "", "arguments")
    assert written(CALL, shape)[1].calls
    assert written(f"It is {CALL}", shape)[1].text == f"It is {CALL}"
    assert written("{a}", shape)[1].text == "{a}"
