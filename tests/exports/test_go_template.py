"""Templates for Ollama against the Jinja templates that they come from, also as Go renders them."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import jinja2
import pytest

from tunekit.errors import DataError
from tunekit.exports.go_template import Render, TurnTexts, derive_turns
from tunekit.records import JsonObject

FORMS = {
    "chatml with a default system message": (
        "{% for message in messages %}{% if loop.first and message.role != 'system' %}"
        '<|im_start|>system\nBe "kind".<|im_end|>\n{% endif %}'
        "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama 3": (
        "{% for message in messages %}{% if loop.first %}<|begin|>{% endif %}<|start|>{{ message.role }}<|end|>\n\n"
        "{{ message.content | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
    ),
    "mistral": (
        "<s>{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
        "{% elif message.role == 'assistant' %} {{ message.content }}</s>"
        "{% else %}{{ raise('no system') }}{% endif %}{% endfor %}"
    ),
    "braces": (
        "{% for message in messages %}"
        "{{ '{{' }} {{ message.role }} {{ '}}' }}\"\"\"\\{{ message.content }}é\n{% endfor %}"
        "{% if add_generation_prompt %}answer: {% endif %}"
    ),
}
CONVERSATION = [
    {"role": "system", "content": "Short answers."},
    {"role": "user", "content": "How many?\nTell me."},
    {"role": "assistant", "content": "Two {{ or }} three"},
    {"role": "user", "content": "Sure?"},
]
PROGRAM = """package main

import ("encoding/json"; "os"; "text/template")

type Message struct { Role, Content string }

func main() {
	var messages []*Message
	text, _ := os.ReadFile(os.Args[1])
	if err := json.NewDecoder(os.Stdin).Decode(&messages); err != nil { panic(err) }
	made := template.Must(template.New("").Parse(string(text)))
	if err := made.Execute(os.Stdout, map[string]any{"Messages": messages}); err != nil { panic(err) }
}
"""


def renderer(source: str) -> Render:
    def refuse(what: str) -> None:
        raise DataError(what)

    template = jinja2.Environment().from_string(source, {"raise": refuse})
    return lambda messages, answer: template.render(messages=messages, add_generation_prompt=answer)


def derived(name: str) -> tuple[Render, TurnTexts]:
    render = renderer(FORMS[name])
    turns = derive_turns(render)
    assert turns is not None
    return render, turns


@pytest.mark.parametrize("name", FORMS)
def test_the_texts_reproduce_the_template(name: str) -> None:
    render, turns = derived(name)
    conversation = CONVERSATION[1:] if name == "mistral" else CONVERSATION
    assert ("system" in turns.before) == (name != "mistral")
    for count in range(len(conversation)):
        part: Sequence[JsonObject] = conversation[: count + 1]
        assert turns.render(part, False) == render(part, False)
    assert turns.render(conversation[1:], True) == render(conversation[1:], True)


@pytest.mark.parametrize(
    "source",
    [
        "{% for message in messages %}{{ loop.index }}: {{ message.content }}\n{% endfor %}",
        "{{ messages[-1].content }}",
        "{% for message in messages %}{{ message.content | upper }}{% endfor %}",
    ],
)
def test_a_template_that_writes_more_has_none(source: str) -> None:
    assert derive_turns(renderer(source)) is None


def test_a_template_that_refuses_a_longer_conversation_has_none() -> None:
    refusing = "{% if messages | length > 3 %}{{ raise('too long') }}{% endif %}"
    assert derive_turns(renderer(FORMS["braces"])) is not None
    assert derive_turns(renderer(refusing + FORMS["braces"])) is None


def test_a_template_that_trims_contents_is_known() -> None:
    assert {name for name in FORMS if derived(name)[1].trims} == {"llama 3"}


@pytest.mark.skipif(shutil.which("go") is None, reason="needs the Go compiler")
@pytest.mark.slow
def test_go_renders_the_same(tmp_path: Path) -> None:
    (tmp_path / "main.go").write_text(PROGRAM)
    build = ["go", "build", "-o", str(tmp_path / "render"), str(tmp_path / "main.go")]
    subprocess.run(build, check=True, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"})
    for name in FORMS:
        render, turns = derived(name)
        (tmp_path / "template").write_text(turns.as_go())
        for conversation in (CONVERSATION, CONVERSATION[1:], CONVERSATION[1:2]):
            if conversation[0]["role"] in turns.before:
                done = subprocess.run(
                    [str(tmp_path / "render"), str(tmp_path / "template")],
                    input=json.dumps(conversation),
                    capture_output=True,
                    text=True,
                    check=True,
                )
                assert done.stdout == render(conversation, True)
