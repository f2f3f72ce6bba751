"""`data.reasoning` by value, and tool calls in the forms of today's data sets, against the template's own output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import chat_templates as templates
from tests.support.data_case import encoder_of, tokenizer_of, trained_texts
from tunekit.data.rendering.turns import ONLY_LAST, THOUGHTLESS
from tunekit.errors import DataError
from tunekit.formats import chat, sharegpt
from tunekit.model.text.tokenizer import LoadedTokenizer

Turn = dict[str, Any]
ROW = [("one?", "T1", "First."), ("two?", "T2", "Second.")]
CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
END = "<|im_end|>"


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> LoadedTokenizer:
    return tokenizer_of(tiny_llama)


def in_field(name: str = "reasoning_content") -> list[Turn]:
    """Two questions, whose answers have their reasoning in a field."""
    pairs = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer, name: thought}]
        for question, thought, answer in ROW
    ]
    return [turn for pair in pairs for turn in pair]


def inline() -> list[Turn]:
    """The same, with the reasoning in the content."""
    rows = in_field()
    for turn in rows:
        if (thought := turn.pop("reasoning_content", None)) is not None:
            turn["content"] = f"<think>\n{thought}\n</think>\n\n{turn['content']}"
    return rows


def bare() -> list[Turn]:
    return [{"role": turn["role"], "content": turn["content"]} for turn in in_field()]


def texts_of(
    tokenizer: LoadedTokenizer, template: str, turns: list[Turn], reasoning: str, **more: Any
) -> tuple[str, Any]:
    """The text of a row, and its trained texts."""
    encoder = encoder_of(tokenizer, template=template, reasoning=reasoning, **more)
    row = encoder.encode(chat.make_example({"messages": turns}), "x:1")
    return tokenizer.decode(row.parts["ids"].tolist()), trained_texts(row, tokenizer)


def applied(tokenizer: LoadedTokenizer, template: str, turns: list[Turn], **more: Any) -> str:
    """transformers' own text."""
    return str(tokenizer.native.apply_chat_template(turns, chat_template=template, tokenize=False, **more))


THINK = ["<think>\nT1\n</think>\n\n", "<think>\nT2\n</think>\n\n"]
ANALYSIS = "<|channel|>analysis<|message|>T{}<|end|><|im_start|>assistant<|channel|>final<|message|>"
FINAL = "<|im_start|>assistant<|channel|>final<|message|>"
# template -> (the field with the reasoning; None: the content), value -> what is trained on
TRAINED = {
    "QWEN3": (
        "reasoning_content",
        {
            "template": [f"{THINK[1]}Second.{END}"],
            "train": [f"{THINK[0]}First.{END}", f"{THINK[1]}Second.{END}"],
            "mask": [f"First.{END}", f"Second.{END}"],
            "drop": [f"<think>\n\n</think>\n\nSecond.{END}"],
        },
    ),
    "R1": (
        None,
        {
            "template": [f"First.{END}", f"Second.{END}"],
            "train": [f"T1\n</think>\n\nFirst.{END}", f"T2\n</think>\n\nSecond.{END}"],
            "mask": [f"First.{END}", f"Second.{END}"],
            "drop": [f"First.{END}", f"Second.{END}"],
        },
    ),
    "SMOLLM3": (
        None,
        {
            "template": [f"{THINK[0]}First.{END}", f"{THINK[1]}Second.{END}"],
            "train": [f"{THINK[0]}First.{END}", f"{THINK[1]}Second.{END}"],
            "mask": [f"First.{END}", f"Second.{END}"],
            "drop": [f"First.{END}", f"Second.{END}"],
        },
    ),
}


@pytest.mark.parametrize("value", ["template", "train", "mask", "drop"])
@pytest.mark.parametrize("name", TRAINED)
def test_what_is_trained_by_value(tiny: LoadedTokenizer, name: str, value: str) -> None:
    field, trained = TRAINED[name]
    template = getattr(templates, name)
    turns = inline() if field is None else in_field(field)
    text, found = texts_of(tiny, template, turns, value)
    assert found == trained[value]
    if value == "template":
        assert text == applied(tiny, template, turns)
    elif value == "drop":
        assert text == applied(tiny, template, bare())
    else:  # both answers as the template writes them in the last turn, or in <think> tags if it never writes them
        assert all(f"<think>\n{thought}\n</think>\n\n{answer}{END}" in text for _, thought, answer in ROW)
        assert text.replace(THINK[0], "").replace(THINK[1], "").replace("<think>\n", "") == applied(
            tiny, template, [*bare(), {"role": "user", "content": ""}]
        ).removesuffix(applied(tiny, template, [{"role": "user", "content": ""}]))


def test_reasoning_in_tags_and_in_a_field_is_the_same(tiny: LoadedTokenizer) -> None:
    for value in ("template", "train", "mask", "drop"):
        one, other = (texts_of(tiny, templates.QWEN3, turns, value) for turns in (in_field(), inline()))
        assert one == other


def test_channels_and_another_end_of_the_last_turn(tiny_llama: Path) -> None:
    native = tokenizer_of(tiny_llama).native
    native.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|return|>", "<|channel|>", "<|message|>"]})
    tiny = LoadedTokenizer(native, None)
    text, trained = texts_of(tiny, templates.HARMONY, in_field("thinking"), "train")
    assert text == (
        f"<|im_start|>user<|message|>one?<|end|><|im_start|>assistant{ANALYSIS.format(1)}First.<|end|>"
        f"<|im_start|>user<|message|>two?<|end|><|im_start|>assistant{ANALYSIS.format(2)}Second.<|return|>"
    )
    _, masked = texts_of(tiny, templates.HARMONY, in_field("thinking"), "mask")
    assert len(trained) == len(masked) == 2
    assert trained[1].startswith(ANALYSIS.format(2))
    assert masked[1].startswith(FINAL + "Second.")


PARTS = ("[THINK]", "[/THINK]")


@pytest.fixture(scope="module")
def magistral(tiny_llama: Path) -> LoadedTokenizer:
    """Its tags are control tokens."""
    native = tokenizer_of(tiny_llama).native
    native.add_special_tokens({"additional_special_tokens": [*PARTS]})
    return LoadedTokenizer(native, None)


def in_parts() -> list[Turn]:
    """The same two questions, with the reasoning in parts of the content, after a system message that has such a
    part."""
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "a draft"}]}
    rows: list[Turn] = [{"role": "system", "content": [{"type": "text", "text": "First "}, thinking]}]
    for turn in in_field("thinking"):
        if (thought := turn.pop("thinking", None)) is not None:
            answer = {"type": "text", "text": turn["content"]}
            turn["content"] = [{"type": "thinking", "thinking": thought}, answer]
        rows.append(turn)
    return rows


def in_tags() -> list[Turn]:
    system = {"role": "system", "content": "First [THINK]a draft[/THINK]"}
    turns = in_field()
    for turn in turns:
        if (thought := turn.pop("reasoning_content", None)) is not None:
            turn["content"] = f"[THINK]{thought}[/THINK]{turn['content']}"
    return [system, *turns]


MAGISTRAL = "[SYSTEM_PROMPT]First [THINK]a draft[/THINK][/SYSTEM_PROMPT][INST]one?[/INST]"
MAGISTRAL += f"[THINK]T1[/THINK]First.{END}[INST]two?[/INST][THINK]T2[/THINK]Second.{END}"


@pytest.mark.parametrize("turns", [in_parts, in_tags])
def test_reasoning_in_parts_of_the_content(magistral: LoadedTokenizer, turns: Any) -> None:
    for value in ("template", "train"):
        found = texts_of(magistral, templates.MAGISTRAL, turns(), value)
        assert found == (MAGISTRAL, [f"[THINK]T1[/THINK]First.{END}", f"[THINK]T2[/THINK]Second.{END}"])
    assert texts_of(magistral, templates.MAGISTRAL, turns(), "mask") == (MAGISTRAL, [f"First.{END}", f"Second.{END}"])
    bare = MAGISTRAL.replace("[THINK]T1[/THINK]", "").replace("[THINK]T2[/THINK]", "")
    assert texts_of(magistral, templates.MAGISTRAL, turns(), "drop") == (bare, [f"First.{END}", f"Second.{END}"])
    row = encoder_of(magistral, template=templates.MAGISTRAL).encode(chat.make_example({"messages": turns()}), "x:1")
    tags = magistral.native.convert_tokens_to_ids([*PARTS])
    assert [row.parts["ids"].tolist().count(tag) for tag in tags] == [3, 3]


def test_parts_before_a_tool_call_and_tags_in_a_question(magistral: LoadedTokenizer) -> None:
    call = {"content": [{"type": "thinking", "thinking": "wonder"}], "tool_calls": [{"function": CALL}]}
    turns = [{"role": "user", "content": "[THINK]q[/THINK]"}, {"role": "assistant", **call}]
    written = f'[TOOL_CALLS]weather[ARGS]{{"city": "Oslo"}}{END}'
    for value, thought in (("template", "[THINK]wonder[/THINK]"), ("train", "[THINK]wonder[/THINK]"), ("mask", "")):
        assert texts_of(magistral, templates.MAGISTRAL, turns, value)[1] == [thought + written]
    row = encoder_of(magistral, template=templates.MAGISTRAL).encode(chat.make_example({"messages": turns}), "x:1")
    assert row.parts["ids"].tolist().count(magistral.native.convert_tokens_to_ids("[THINK]")) == 1


def test_parts_for_a_template_with_another_form(magistral: LoadedTokenizer) -> None:
    """They are kept in this form, or refused; they are never spelled text."""
    assert texts_of(magistral, templates.QWEN3, in_parts()[1:], "train")[1] == [
        f"{THINK[0]}First.{END}",
        f"{THINK[1]}Second.{END}",
    ]
    with pytest.raises(DataError, match=r"does not read 'thinking' of a message.*reads 'reasoning_content': rename"):
        texts_of(magistral, templates.QWEN3, in_parts()[1:], "template")


def loop_of_tools() -> list[Turn]:
    """Two questions, each answered after a tool call, and each turn with reasoning."""
    rows: list[Turn] = []
    for number, (question, _, answer) in enumerate(ROW):
        call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
        rows += [{"role": "user", "content": question}, {**call, "reasoning_content": f"C{number}"}]
        rows += [{"role": "tool", "content": "rain"}]
        rows += [{"role": "assistant", "content": answer, "reasoning_content": f"D{number}"}]
    return rows


def test_reasoning_before_tool_calls(tiny: LoadedTokenizer) -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    text, trained = texts_of(tiny, templates.QWEN3, loop_of_tools(), "train")
    thoughts = [f"<think>\n{letter}{number}\n</think>\n\n" for number in (0, 1) for letter in "CD"]
    answers = [call, f"First.{END}", call, f"Second.{END}"]
    assert trained == [thought + answer for thought, answer in zip(thoughts, answers, strict=True)]
    assert texts_of(tiny, templates.QWEN3, loop_of_tools(), "mask") == (text, answers)
    for count in (2, 4):  # each beginning of the row is the template's own text of this beginning
        assert text.startswith(applied(tiny, templates.QWEN3, loop_of_tools()[:count]))


def test_every_token_but_the_masked_ones(tiny: LoadedTokenizer) -> None:
    text, trained = texts_of(tiny, templates.QWEN3, in_field(), "train", train_on="all")
    assert "".join(trained) == text
    masked = texts_of(tiny, templates.QWEN3, in_field(), "mask", train_on="all")
    assert "".join(masked[1]) == text.replace(THINK[0], "").replace(THINK[1], "")


def test_special_tokens_in_kept_reasoning_stay_text(tiny: LoadedTokenizer) -> None:
    turns = in_field()
    turns[1]["reasoning_content"] = turns[0]["content"] = f"a{END}b"
    for template in (templates.QWEN3, templates.SMOLLM3):
        encoder = encoder_of(tiny, template=template, reasoning="train")
        row = encoder.encode(chat.make_example({"messages": turns}), "x:1")
        assert f"<think>\na{END}b\n</think>" in tiny.decode(row.parts["ids"].tolist())
        assert sum(token in tiny.special_ids for token in row.parts["ids"].tolist()) == 8


def test_a_template_that_reads_reasoning_but_never_writes_it(tiny: LoadedTokenizer) -> None:
    template = templates.QWEN3.replace("<think>\n{{ r }}", "<think>\n")
    with pytest.raises(DataError, match=r"reads 'reasoning_content', but leaves it out.*"):
        texts_of(tiny, template, in_field(), "train")


def test_reasoning_that_the_template_leaves_out_is_reported(tiny: LoadedTokenizer) -> None:
    for template, turns, left_out, notice in (
        (templates.QWEN3, in_field(), [1], ONLY_LAST),
        (templates.R1, inline(), [1, 3], THOUGHTLESS),
        (templates.SMOLLM3, inline(), [], ""),
    ):
        encoder = encoder_of(tiny, template=template)
        example = chat.make_example({"messages": turns})
        encoder.encode(example, "x:1")
        assert encoder.reasoning_left_out(example) == left_out
        assert list(encoder.notices) == ([notice] if notice else [])
        assert encoder_of(tiny, template=template, reasoning="train").reasoning_left_out(example) == []


def test_only_reasoning_is_an_empty_answer(tiny: LoadedTokenizer) -> None:
    turns = [
        *bare()[:2],
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>\nT\n</think>\n\n"},
    ]
    for value in ("train", "mask", "drop"):
        assert len(texts_of(tiny, templates.SMOLLM3, turns, value)[1]) == 1


WRITTEN = {  # the same call, as data sets write it
    "openai": {"tool_calls": [{"id": "c", "type": "function", "function": {**CALL, "arguments": '{"city": "Oslo"}'}}]},
    "object": {"tool_calls": [{"type": "function", "function": CALL}]},
    "flat": {"tool_calls": [CALL]},
    "text": {"tool_calls": json.dumps([CALL])},
    "older": {"function_call": {**CALL, "arguments": '{"city": "Oslo"}'}},
}
CALLS = {
    "HERMES": '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
    "LLAMA31": '{"name": "weather", "parameters": {"city": "Oslo"}}',
    "MISTRAL": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo"}}]',
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("form", WRITTEN)
def test_calls_in_every_form_are_one(tiny: LoadedTokenizer, name: str, form: str) -> None:
    start, end = (
        {"role": "user", "content": "q"},
        [{"role": "tool", "content": "rain"}, {"role": "assistant", "content": "R."}],
    )
    for tools in (TOOLS, json.dumps(TOOLS), [json.dumps(tool) for tool in TOOLS]):
        example = chat.make_example(
            {"messages": [start, {"role": "assistant", "content": None, **WRITTEN[form]}, *end], "tools": tools}
        )
        row = encoder_of(tiny, template=getattr(templates, name)).encode(example, "x:1")
        canonical = {"role": "assistant", "content": "", **WRITTEN["object"]}
        text = applied(tiny, getattr(templates, name), [start, canonical, *end], tools=TOOLS)
        assert tiny.decode(row.parts["ids"].tolist()) == text
        lead = " " if name == "MISTRAL" else ""
        assert trained_texts(row, tiny) == [f"{CALLS[name]}{END}", f"{lead}R.{END}"]


def test_rows_of_hermes_are_not_wrapped_twice(tiny: LoadedTokenizer) -> None:
    values = ("<tools>[]</tools>", "q", CALLS["HERMES"], "<tool_response>\nrain\n</tool_response>", "R.")
    senders = ("system", "human", "gpt", "tool", "gpt")
    turns = [{"from": sender, "value": value} for sender, value in zip(senders, values, strict=True)]
    row = {"conversations": turns, "tools": json.dumps(TOOLS)}
    encoded = encoder_of(tiny, template=templates.HERMES).encode(sharegpt.make_example(row), "x:1")
    text = tiny.decode(encoded.parts["ids"].tolist())
    assert text.count("<tools>") == text.count("<tool_response>") == 1
    assert trained_texts(encoded, tiny) == [f"{CALLS['HERMES']}{END}", f"R.{END}"]


def test_senders_of_tools(tiny: LoadedTokenizer) -> None:
    forms = []
    for call, response in (("function_call", "observation"), ("tool_call", "tool_response")):
        turns = [{"from": "human", "value": "q"}, {"from": call, "value": json.dumps(CALL)}]
        turns += [{"from": response, "value": "rain"}, {"from": "gpt", "value": "R."}]
        forms.append(sharegpt.make_example({"conversations": turns}))
    assert forms[0] == forms[1]


def test_a_prompt_of_a_template_without_generation_prompt(tiny: LoadedTokenizer) -> None:
    for template, lead in (
        (templates.SMOLLM3.split("{% if add")[0], "<|im_start|>assistant\n"),
        (templates.MISTRAL, ""),
    ):
        encoder = encoder_of(tiny, template=template)
        example = chat.make_example({"messages": bare()})
        row, found = encoder.encode(example, "x:1"), encoder.prompt(example)
        assert found is not None
        assert row.parts["ids"].tolist()[: len(found[0])] == found[0]
        assert tiny.decode(found[0]).endswith(f"two?{END}\n{lead}" if lead else "two?[/INST]")
