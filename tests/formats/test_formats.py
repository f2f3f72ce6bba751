"""Each format's rows become the examples they mean; names of formats have both their halves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tunekit.data.reading.first import choose_format, format_maker, open_rows
from tunekit.data.reading.problems import Problems
from tunekit.errors import DataError
from tunekit.formats import preference, unpaired
from tunekit.formats.example import ChatExample, CompletionExample, Message, TextExample
from tunekit.recipe.data import Source
from tunekit.recipe.reading.names import facts_of, known_names

CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
SHARE = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
ASKED = {"role": "user", "content": "q"}
FROM_A = {"from": "gpt", "value": "a"}
QA = (Message("user", "q"), Message("assistant", "a"))


def make(name: str, row: dict[str, Any]) -> Any:
    return format_maker(name)(row)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (CHAT, "chat"),
        (SHARE, "sharegpt"),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca"),
        ({"prompt": "q", "completion": "a", "id": 3}, "prompt_completion"),
        ({"text": "t", "source": "x"}, "text"),
    ],
)
def test_auto_names_the_format_and_why(row: dict[str, Any], name: str) -> None:
    found, reason = choose_format("auto", row, "text")
    assert found == name
    assert f"'{facts_of('formats', name).REQUIRED[0]}'" in reason
    assert choose_format("text", row, "text")[0] == "text"


def test_every_format_has_both_halves() -> None:
    for name in known_names("formats"):
        assert callable(format_maker(name))
        assert set(facts_of("formats", name).REQUIRED) <= set(facts_of("formats", name).FIELDS)


def test_chat() -> None:
    assert make("chat", CHAT) == ChatExample(QA)
    parts = {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]}
    assert make("chat", {"messages": [parts]}).messages[0].content == "qr"
    untrained = make("chat", {"messages": [{"role": "assistant", "content": "a", "weight": 0}]})
    assert not untrained.messages[0].weight


def test_a_message_says_how_much_it_counts() -> None:
    for name, value, weight in (("weight", 0.5, 0.5), ("weight", 3, 3.0), ("train", False, 0.0), ("train", True, 1.0)):
        row = {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "a", name: value}]}
        assert make("chat", row).messages[1] == Message("assistant", "a", weight)
    turn = {"from": "gpt", "value": "a", "train": False}
    assert make("sharegpt", {"conversations": [turn]}).messages[0].weight == 0


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"weight": -1}, "weight' must be a number"),
        ({"weight": True}, "weight' must be a number"),
        ({"weight": float("nan")}, "weight' must be a number"),
        ({"train": "no"}, "train' must be true or false"),
        ({"train": 0, "weight": 1}, "both weight and train"),
    ],
)
def test_a_message_that_says_it_wrongly(extra: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        make("chat", {"messages": [{"role": "assistant", "content": "a", **extra}]})


@pytest.mark.parametrize("extra", [{"train": True}, {"weight": 0.5}, {"weight": 3}])
def test_a_weight_of_who_is_not_trained_on_is_refused(extra: dict[str, Any]) -> None:
    """0 and 1 say nothing of a user's message: 1 is what a message without a weight has."""
    name = next(iter(extra))
    with pytest.raises(DataError, match=rf"messages\[0\]' has {name}: .*, but its role is 'user'"):
        make("chat", {"messages": [{"role": "user", "content": "q", **extra}]})
    for harmless in ({"train": False}, {"weight": 0}, {"weight": 1}):
        make("chat", {"messages": [{"role": "user", "content": "q", **harmless}]})


def test_a_row_says_how_much_it_counts() -> None:
    rows = {
        "chat": CHAT,
        "prompt_completion": {"prompt": "q", "completion": "a"},
        "text": {"text": "a"},
        "alpaca": {"instruction": "q", "output": "a"},
        "alpaca_turn": {"instruction": "q", "output": "a"},
    }
    for name, row in rows.items():
        assert format_maker(name)({**row, "sample_weight": 2}) == replace(make(name, row), weight=2.0)
        assert format_maker(name)({**row, "sample_weight": None}) == make(name, row)
        with pytest.raises(DataError, match="sample_weight' must be a number, 0 or more"):
            format_maker(name)({**row, "sample_weight": "2"})
        for wrong in (10**400, 1e39, 1e-50, float("nan")):  # the last but two are infinite, or 0, in float32
            with pytest.raises(DataError, match="write 0, or from 1e-15 to 1e\\+15"):
                format_maker(name)({**row, "sample_weight": wrong})
    with pytest.raises(DataError, match="sample_weight' is only supported for rows of text"):
        format_maker("labels")({"text": "a", "label": "b", "sample_weight": 2})


def test_chat_with_tools_reads_arguments_and_null_content() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    tools = [{"type": "function", "function": {"name": "f"}}]
    messages = [
        {"role": "user", "content": "q", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "assistant", "content": "a"},
    ]
    example = make("chat", {"messages": messages, "tools": tools})
    assert example.tools == tuple(tools)
    assert example.messages[1].content == ""
    assert example.messages[1].extra["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert example.messages[2].as_dict() == {"role": "tool", "content": "2", "tool_call_id": "1"}
    assert make("chat", {"messages": messages, "tools": json.dumps(tools)}).tools == tuple(tools)
    assert make("chat", {**CHAT, "tools": None}).tools is None


def test_only_the_assistant_calls_tools() -> None:
    bad = {"role": "user", "content": "q", "tool_calls": [{"function": {"name": "f"}}]}
    with pytest.raises(DataError, match="only messages of the assistant"):
        make("chat", {"messages": [bad]})


def test_sharegpt() -> None:
    assert make("sharegpt", SHARE) == ChatExample(QA)
    assert make("sharegpt", {**SHARE, "system": "s"}).messages == (Message("system", "s"), *QA)
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
    found = make("sharegpt", {"conversations": [call, {"from": "observation", "value": "2"}]}).messages
    assert found[0].extra["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert found[1].role == "tool"


def test_alpaca() -> None:
    found = make("alpaca", {"instruction": "q", "input": "i", "output": "a"})
    assert found.messages == (Message("user", "q\ni"), Message("assistant", "a"))
    assert found.without_template.prompt.endswith("### Instruction:\nq\n\n### Input:\ni\n\n### Response:\n")
    assert make("alpaca", {"instruction": "q", "input": None, "output": "a"}).messages == QA
    full = make("alpaca", {"instruction": "q", "output": "a", "system": "s", "history": [["x", "y"]]})
    assert [message.content for message in full.messages] == ["s", "x", "y", "q", "a"]
    assert full.without_template is None


def test_the_prompts_of_other_tools_for_alpacas_rows() -> None:
    """As Axolotl, torchtune and Unsloth render these rows: plain text, a user's turn, and with an empty input."""
    row = {"instruction": "q", "input": "", "output": "a", "system": "s"}
    head = "Below is an instruction that describes a task"
    task = "Write a response that appropriately completes the request.\n\n### Instruction:\nq\n\n"
    plain = CompletionExample(f"{head}. {task}### Response:\n", "a")
    assert make("alpaca_prompt", row) == plain
    turns = (Message("user", plain.prompt), Message("assistant", "a"))
    assert make("alpaca_turn", row) == ChatExample(turns, without_template=plain)
    further = f"{head}, paired with an input that provides further context. {task}### Input:\n"
    assert make("alpaca_with_input", row) == CompletionExample(f"{further}\n\n### Response:\n", "a")
    for name in ("alpaca_prompt", "alpaca_with_input"):
        assert make(name, {**row, "input": "i"}) == CompletionExample(f"{further}i\n\n### Response:\n", "a")


def test_prompt_completion() -> None:
    assert make("prompt_completion", {"prompt": " q\n", "completion": "a "}) == CompletionExample(" q\n", "a ")
    turns = make("prompt_completion", {"prompt": CHAT["messages"], "completion": CHAT["messages"][1:]})
    assert [bool(message.weight) for message in turns.messages] == [False, False, True]
    with pytest.raises(DataError, match="both"):
        make("prompt_completion", {"prompt": CHAT["messages"], "completion": "a"})


def test_text_keeps_every_byte() -> None:
    assert make("text", {"text": " \u2028\x85 a\r\n"}) == TextExample(" \u2028\x85 a\r\n")


CONVERSATIONS = {"chosen": CHAT["messages"], "rejected": [ASKED, {"role": "assistant", "content": "b"}]}
SYSTEM, MORE = {"role": "system", "content": "s"}, {"role": "user", "content": "q2"}


def turns(*texts: str) -> tuple[Message, ...]:
    roles = {"q": "user", "s": "system"}
    return tuple(Message(roles.get(text[0], "assistant"), text) for text in texts)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, ("q", "a", "b")),
        (
            {"prompt": [ASKED], "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"},
            (turns("q"), turns("a"), turns("b")),
        ),
        ({"chosen": "Q: x? A: yes it is", "rejected": "Q: x? A: no"}, ("Q: x? A:", " yes it is", " no")),
        (
            {"chosen": CHAT["messages"], "rejected": [ASKED, {"role": "assistant", "content": "b"}]},
            (turns("q"), turns("a"), turns("b")),
        ),
        (
            {
                **SHARE,
                "conversations": SHARE["conversations"][:1],
                "chosen": FROM_A,
                "rejected": {**FROM_A, "value": "b"},
            },
            (turns("q"), turns("a"), turns("b")),
        ),
        (
            {"instruction": "q", "input": "x", "chosen": "a", "rejected": "b", "system": "s"},
            ((*turns("s"), Message("user", "q\nx")), turns("a"), turns("b")),
        ),
        ({"question": "q", "chosen": "a", "rejected": "b"}, (turns("q"), turns("a"), turns("b"))),
        ({"prompt": "q", "chosen": None, "rejected": "b"}, ("q", "", "b")),
        ({"chosen": CHAT["messages"], "rejected": CHAT["messages"]}, (turns("q"), turns("a"), turns("a"))),
        ({"prompt": "q ", **CONVERSATIONS}, (turns("q"), turns("a"), turns("b"))),  # as in ultrafeedback_binarized
        ({"prompt": [ASKED], **CONVERSATIONS}, (turns("q"), turns("a"), turns("b"))),
        ({"prompt": "", **CONVERSATIONS}, (turns("q"), turns("a"), turns("b"))),
        (
            {"prompt": "q", **{name: [SYSTEM, *answer] for name, answer in CONVERSATIONS.items()}},
            (turns("s", "q"), turns("a"), turns("b")),
        ),
        (
            {"prompt": CHAT["messages"], **{name: [MORE, answer[1]] for name, answer in CONVERSATIONS.items()}},
            (turns("q", "a"), turns("q2", "a"), turns("q2", "b")),
        ),
    ],
)
def test_preference(row: dict[str, Any], expected: tuple[Any, Any, Any]) -> None:
    found = make("preference", row)
    assert (found.prompt, found.chosen, found.rejected) == expected
    answered = found.answered(found.chosen)
    if isinstance(found.chosen, str):
        assert answered == CompletionExample(*expected[:2])
    else:
        assert [bool(message.weight) for message in answered.messages] == [False] * len(expected[0]) + [True] * len(
            expected[1]
        )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "q", "chosen": "a"}, "no field 'rejected'"),
        ({"prompt": "p", "question": "q", "chosen": "a", "rejected": "b"}, "'prompt' and 'question' are both prompts"),
        (
            {"chosen": "a", "rejected": CHAT["messages"]},
            "is text, and the other one is a list of messages; write both as text",
        ),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "'chosen' must be text"),
    ],
)
def test_preference_says_what_is_wrong(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        make("preference", row)


ANSWERED = {"completion": "a", "label": True}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", **ANSWERED}, ("q", "a")),
        (
            {"prompt": [ASKED], "completion": [{"role": "assistant", "content": "a"}], "label": True},
            (turns("q"), turns("a")),
        ),
        ({"prompt": "q", "completion": None, "label": True}, ("q", "")),
        (
            {"instruction": "q", "input": "x", "output": "a", "system": "s", "kto_tag": True},
            ((*turns("s"), Message("user", "q\nx")), turns("a")),
        ),
        ({**CHAT, "label": True}, (turns("q"), turns("a"))),
        ({**SHARE, "kto_tag": True}, (turns("q"), turns("a"))),
        ({"question": "q", **ANSWERED}, (turns("q"), turns("a"))),
        ({"completion": CHAT["messages"], "label": True}, (turns("q"), turns("a"))),
        ({"prompt": "q", "completion": CHAT["messages"], "label": True}, (turns("q"), turns("a"))),
    ],
)
def test_unpaired(row: dict[str, Any], expected: tuple[Any, Any]) -> None:
    found = make("unpaired", row)
    assert (found.prompt, found.completion, found.label) == (*expected, True)
    assert choose_format("auto", row, "unpaired")[0] == "unpaired"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "q", "completion": "a", "label": 1}, "'label' must be true or false, not '1'"),
        ({"prompt": "q", "completion": "a", "label": None}, "'label' must be true or false, not 'None'"),
        ({"prompt": "q", "completion": "a"}, "no field 'label'"),
        ({"prompt": "q", "label": True}, "no field 'completion'"),
        ({"messages": [ASKED], "label": True}, "no field 'completion'"),
        ({"prompt": "q", **ANSWERED, "kto_tag": False}, "'label' and 'kto_tag' have the same meaning"),
    ],
)
def test_unpaired_says_what_is_wrong(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        make("unpaired", row)


@pytest.mark.parametrize("margin", ["0.5", True, float("nan")])
def test_a_margin_is_a_number(margin: Any) -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert make("preference", {**pair, "margin": 2}).margin == 2.0
    with pytest.raises(DataError, match="'margin' must be a number"):
        make("preference", {**pair, "margin": margin})


def test_a_pair_is_two_unpaired_rows(tmp_path: Path) -> None:
    pairs = [{"chosen": "Q: x? A: yes", "rejected": "Q: x? A: no"}, {"prompt": "q", **ANSWERED}]
    (tmp_path / "d.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in pairs), encoding="utf-8")
    rows, _, name, reason = open_rows(Source(path=str(tmp_path / "d.jsonl")), "unpaired", Problems())
    found = [(raw.line, make(name, raw.values)) for raw in rows]
    answers = [(line, example.prompt, example.completion, example.label) for line, example in found]
    assert answers == [(1, "Q: x? A:", " yes", True), (1, "Q: x? A:", " no", False), (2, "q", "a", True)]
    assert reason == "the first row is a pair, and each pair becomes two rows"


TURN = {"role": "user", "content": "q"}
YES, NO = ([TURN, {"role": "assistant", "content": text}] for text in ("yes", "no"))


@pytest.mark.parametrize(
    "pair",
    [
        {"chosen": "Q: x? A: yes", "rejected": "Q: x? A: no"},
        {"chosen": YES, "rejected": NO},
        {"prompt": "q", "chosen": "a", "rejected": None, "margin": 2},
        {"prompt": [TURN], "chosen": YES[1], "rejected": NO[1:], "tools": None},
        {"instruction": "q", "input": "more", "output": "unread", "chosen": "a", "rejected": "b"},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": FROM_A, "rejected": {**FROM_A, "value": "b"}},
        {"instruction": "q", "chosen": YES, "rejected": NO, "system": "s"},
        {"prompt": "q", "chosen": [*YES, TURN, YES[1]], "rejected": [*YES, TURN, NO[1]]},
    ],
)
@pytest.mark.parametrize("label", [True, False])
def test_one_answer_of_a_pair_is_written_as_a_row_that_is_read_once(pair: dict[str, Any], label: bool) -> None:
    row = {**pair, "label": label}
    written = json.loads(json.dumps(unpaired.single_row(row)))
    assert not preference.is_pair(written)
    assert make("unpaired", written) == make("unpaired", row)
    assert unpaired.single_row(written) == written


def test_pairs_are_told_from_other_rows() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert choose_format("auto", row, "preference")[0] == "preference"
    with pytest.raises(DataError, match="preference pairs; choose an objective for preference pairs"):
        choose_format("auto", row, "text")


SEGMENTS = [{"start": 0, "end": 1, "text": " one"}, {"start": 1, "end": 2, "text": "two"}]


@pytest.mark.parametrize("more", [{}, {"text": None}, {"text": " "}])
def test_a_transcript_with_segments_needs_no_text(more: dict[str, Any]) -> None:
    row = {"audio": "a.wav", "segments": SEGMENTS, **more}
    assert choose_format("auto", row, "transcript")[0] == "transcript"
    assert make("transcript", row).text == "one two"


def test_a_transcript_without_segments_has_a_text() -> None:
    assert choose_format("auto", {"audio": "a.wav", "segments": []}, "transcript")[1].endswith("'audio' and 'segments'")
    assert make("transcript", {"audio": "a.wav", "segments": [], "text": "one"}).text == "one"
    with pytest.raises(DataError, match="no field 'text'"):
        make("transcript", {"audio": "a.wav", "segments": []})


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        (
            "chat",
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "0 images in its columns, but 1 places",
        ),
        (
            "chat",
            {"messages": [{"role": "user", "content": ["q"]}]},
            r"a 'str' part; .*\{\"type\": \"text\", \"text\": ",
        ),
        ("labels", {"text": [{"type": "text", "text": "x"}], "label": "a"}, "'text' must be text, not list"),
        ("sharegpt", {"conversations": []}, "must be a list of turns, not an empty one"),
    ],
)
def test_parts_without_text_are_named(name: str, row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        make(name, row)
