"""The chat templates that trl ships: what is trained on is each answer with what ends it, worked out by hand."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

from tests.data.test_render import make_tokenizer
from tests.support.data_case import encoder_of, trained_texts
from tunekit.data.rendering.render import AS_GIVEN
from tunekit.data.rendering.turns import ONLY_LAST, THOUGHTLESS
from tunekit.errors import DataError
from tunekit.formats.chat import make_example
from tunekit.model.text.generation import end_of_turn_ids
from tunekit.model.text.tokenizer import LoadedTokenizer

TRL = importlib.util.find_spec("trl")
FOLDER = Path(TRL.origin or "").parent / "chat_templates" if TRL is not None else Path("absent")
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="trl's templates are absent: pip install trl")
SPECIAL = re.compile(r"<[|｜][^<>'\"{}]*?[|｜]>|</?s>|<\|?[a-z_]+\|?>|<\|\"\|>|\[gMASK\]")
NO_MARKERS = {"<tools>", "<think>", "<tool_call>", "<tool_response>"}

# The template's name begins so: (what a model writes before an answer, after an earlier answer, after the last one).
ENDS: dict[str, tuple[str, str, str]] = {
    "cohere2": ("", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "cohere": ("", "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    "deepseek": ("", "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "diffusion_gemma": ("", "<turn|>", "<turn|>"),
    "gemma4": ("", "<turn|>", "<turn|>"),
    "gemma": ("", "<end_of_turn>", "<end_of_turn>"),
    "glm4moe": ("\n<think></think>\n", "<|user|>", "<eos>"),  # a turn ends where the next one is opened
    "gptoss": ("<|channel|>final<|message|>", "<|end|>", "<|return|>"),
    "idefics3": (" ", "<end_of_utterance>", "<end_of_utterance>"),
    "lfm2": ("", "<|im_end|>", "<|im_end|>"),
    "llama3": ("", "<|eot_id|>", "<|eot_id|>"),
    "llava_next": (" ", "</s>", "</s>"),
    "muse_glimmer": (" to=user<|message|>", "<|eot|>", "<|eot|>"),
    "nemotron_3": ("</think>", "<|im_end|>", "<|im_end|>"),  # the prompt ends with <think>
    "phi3": ("", "<|end|>", "<|end|>\n<eos>"),
    "qwen3_5_think": ("\n</think>\n\n", "", "<|im_end|>"),
    "qwen3_6": ("\n</think>\n\n", "", "<|im_end|>"),
    "qwen3_8": ("\n</think>\n\n", "<|im_end|>", "<|im_end|>"),
    "qwen3_5_nothink": ("", "", "<|im_end|>"),
    "qwen3_instruct": ("", "<|im_end|>", "<|im_end|>"),
    "qwen3_vl": ("", "<|im_end|>", "<|im_end|>"),
    "qwen3": ("<think>\n\n</think>\n\n", "", "<|im_end|>"),
    "qwen2_5": ("", "<|im_end|>", "<|im_end|>"),
    "smolvlm": (" ", "<end_of_utterance>", "<end_of_utterance>"),
}
REWRITES = ("qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6")  # earlier answers, once others follow
ASKED = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "First."}]
CHAT = [*ASKED, {"role": "user", "content": "two?"}, {"role": "assistant", "content": "Second."}]
ORIGINALS = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))
CALL = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
SCHEMA = {"type": "object", "properties": {}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "of a place", "parameters": SCHEMA}}]
CALLED = [
    CHAT[0],
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "rain"},
    {"role": "assistant", "content": "Rainy."},
]


@cache
def tokenizer_for(name: str) -> LoadedTokenizer:
    """Byte by byte, with the template's own control tokens."""
    template = (FOLDER / f"{name}.jinja").read_text("utf-8")
    words = ["<eos>", "<bos>", *sorted(set(SPECIAL.findall(template)) - NO_MARKERS - {"<eos>", "<bos>"})]
    tokenizer = make_tokenizer(words, eos="<eos>", bos="<bos>")
    tokenizer.chat_template = template
    return tokenizer


def parts_of(name: str) -> tuple[str, str, str]:
    """The entry of ENDS with the longest name that this one begins with."""
    return ENDS[max((start for start in ENDS if name.startswith(start)), key=len)]


@pytest.mark.parametrize("name", ORIGINALS)
def test_each_answer_is_trained_with_what_ends_it(name: str) -> None:
    tokenizer = tokenizer_for(name)
    encoder = encoder_of(tokenizer)
    row = encoder.encode(make_example({"messages": CHAT}), "x:1")
    lead, earlier, last = parts_of(name)
    wanted = [f"{lead}First.{earlier}", f"{lead}Second.{last}"]
    assert trained_texts(row, tokenizer) == (wanted[1:] if name in REWRITES else wanted)
    assert (ONLY_LAST in encoder.notices) == (name in REWRITES)


# What is trained on of a conversation whose answers were thought about, by hand: first answer, second answer.
THOUGHT = {
    "diffusion_gemma": (
        "<|channel>thought\nT1\n<channel|>First.<turn|>",
        "<|channel>thought\nT2\n<channel|>Second.<turn|>",
    ),
    "glm4moe": ("\n<think>T1</think>\nFirst.<eos>", "\n<think>T2</think>\nSecond.<eos>"),
    "gptoss": (
        "<|channel|>analysis<|message|>T1<|end|><|start|>assistant<|channel|>final<|message|>First.<|return|>",
        "<|channel|>analysis<|message|>T2<|end|><|start|>assistant<|channel|>final<|message|>Second.<|return|>",
    ),
    "lfm2_2_5": ("<think>T1</think>First.<|im_end|>", "<think>T2</think>Second.<|im_end|>"),  # which has markers
    "nemotron_3_nano": ("T1\n</think>\nFirst.<|im_end|>", "T2\n</think>\nSecond.<|im_end|>"),
    "qwen3": ("<think>\nT1\n</think>\n\nFirst.<|im_end|>", "<think>\nT2\n</think>\n\nSecond.<|im_end|>"),
    "qwen3_6": ("T1\n</think>\n\nFirst.<|im_end|>", "T2\n</think>\n\nSecond.<|im_end|>"),
}


@pytest.mark.parametrize("name", THOUGHT)
def test_each_answer_is_trained_with_its_thinking_as_it_was_given(name: str) -> None:
    """Templates that leave the thinking of earlier answers out; each row is the conversation so far, as rendered."""
    tokenizer, field = tokenizer_for(name), "thinking" if name in ("gptoss", "lfm2_2_5") else "reasoning_content"
    messages = [*CHAT[:1], {**CHAT[1], field: "T1"}, CHAT[2], {**CHAT[3], field: "T2"}]
    for mode, wanted, ends in (("each", list(THOUGHT[name]), (2, 4)), ("last", [THOUGHT[name][1]], (4,))):
        encoder = encoder_of(tokenizer, rewritten_answers=mode)
        examples = encoder.examples(make_example({"messages": messages}))
        rows = [encoder.encode(example, "x:1") for example in examples]
        texts = [text for row in rows for text in trained_texts(row, tokenizer)]
        assert texts == (wanted if mode == "each" or name != "lfm2_2_5" else ["First.<|im_end|>", *wanted])
        told = {"each": AS_GIVEN, "last": THOUGHTLESS if name == "lfm2_2_5" else ONLY_LAST}[mode]
        assert encoder.notices[told] == 1
        for row, end in zip(rows, ends, strict=True):  # GLM's template ends no turn
            assert tokenizer.decode(row.parts["ids"].tolist()).removesuffix("<eos>") == tokenizer.render(messages[:end])


@pytest.mark.parametrize("name", [*REWRITES, "qwen3_8"])
def test_kept_reasoning_is_what_trl_writes(name: str) -> None:
    """trl's copies of these templates write the reasoning of every answer; here the original template is used."""
    thoughts = {1: "T1", 3: "T2"}
    messages = [{**turn, "reasoning_content": thoughts[at]} if at in thoughts else turn for at, turn in enumerate(CHAT)]
    tokenizer, marked = tokenizer_for(name), (FOLDER / f"{name}_training.jinja").read_text("utf-8")
    theirs = tokenizer.native.apply_chat_template(messages, chat_template=marked, tokenize=False)
    for reasoning in ("train", "mask"):
        row = encoder_of(tokenizer, reasoning=reasoning).encode(make_example({"messages": messages}), "x:1")
        assert tokenizer.decode(row.parts["ids"].tolist()) == theirs
        assert ["T1" in trained for trained in trained_texts(row, tokenizer)] == [reasoning == "train", False]


THOUGHTS = [
    CALLED[0],
    {**CALLED[1], "content": "", "thinking": "T1"},
    CALLED[2],
    {**CALLED[3], "thinking": "T2"},
]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("qwen2_5", '<think>\nT1\n</think>\n\n<tool_call>\n{"name": "weather"'),
        ("qwen3_vl", '<think>\nT1\n</think>\n\n<tool_call>\n{"name": "weather"'),
        ("llama3_1", '<think>\nT1\n</think>\n\n{"name": "weather"'),
        ("lfm2_v2", "<think>\nT1\n</think>\n\n<|tool_call_start|>[weather("),
        ("gptoss", "<|channel|>analysis<|message|>T1<|end|><|start|>assistant to=functions.weather<|channel|>"),
    ],
)
def test_reasoning_is_kept_before_a_tool_call(name: str, call: str) -> None:
    """Also where the template has no field for it, and where it drops it once the answer follows (gpt-oss)."""
    encoder = encoder_of(tokenizer_for(name), reasoning="train")
    first, second = trained_texts(
        encoder.encode(make_example({"messages": THOUGHTS, "tools": TOOLS}), "x:1"), tokenizer_for(name)
    )
    assert first.startswith(call)
    assert "T2" in second
    assert "Rainy." in second


@pytest.mark.parametrize("name", ["llama3", "phi3", "qwen2_5_vl", "deepseek_r1_distill"])
def test_a_template_without_tool_calls_is_named_as_the_cause(name: str) -> None:
    encoder = encoder_of(tokenizer_for(name), reasoning="train")
    with pytest.raises(DataError, match="the chat template leaves out tool calls; give a template that writes them"):
        encoder.encode(make_example({"messages": THOUGHTS}), "x:1")


def test_an_answer_that_no_template_rewrites_stays_in_its_conversation() -> None:
    for name, turns in (("llama3", CHAT), ("qwen3", ASKED)):
        encoder = encoder_of(tokenizer_for(name), rewritten_answers="each")
        example = make_example({"messages": turns})
        assert encoder.examples(example) == [example]
        assert not encoder.notices


@pytest.mark.parametrize("name", [name for name in ORIGINALS if (FOLDER / f"{name}_training.jinja").exists()])
def test_the_mask_is_that_of_trl_but_for_headers_and_line_ends(name: str) -> None:
    """trl's own copies of the templates, with {% generation %} markers, read by transformers."""
    tokenizer, marked = tokenizer_for(name), (FOLDER / f"{name}_training.jinja").read_text("utf-8")
    content = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in CHAT]
    theirs = tokenizer.native.apply_chat_template(
        content if name in ("idefics3", "llava_next", "smolvlm") else CHAT,
        chat_template=marked,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    spoken = [token for token, mask in zip(theirs["input_ids"], theirs["assistant_masks"], strict=True) if mask]
    row = encoder_of(tokenizer).encode(make_example({"messages": CHAT}), "x:1")
    rest = tokenizer.decode(spoken)
    for text in trained_texts(row, tokenizer):
        found = text if text in rest else text.replace("<eos>", "<|user|>")  # trl ends GLM's last answer as the others
        before, said, rest = rest.partition(found)
        assert said
        assert not {"First.", "Second."} & set(before.split("<|im_end|>")) or name in REWRITES
    assert not rest.strip()


@pytest.mark.parametrize("name", ["deepseekv3", "glm4moe", "gptoss", "qwen2_5", "llama3_1", "gemma4"])
def test_tool_calls_are_trained_as_the_template_writes_them(name: str) -> None:
    written = {
        "deepseekv3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Oslo"}\n```'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>",
        "glm4moe": "\n<think></think>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n"
        "</tool_call><|observation|>",
        "gptoss": ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>',
        "qwen2_5": '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
        "llama3_1": '{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>',
        "gemma4": '<|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|><|tool_response>',
    }
    tokenizer = tokenizer_for(name)
    row = encoder_of(tokenizer).encode(make_example({"messages": CALLED, "tools": TOOLS}), "x:1")
    lead, _, last = parts_of(name)
    assert trained_texts(row, tokenizer) == [written[name], f"{lead}Rainy.{last}"]


@pytest.mark.parametrize(
    ("name", "field", "hint"),
    [
        ("gptoss", "thinking", None),
        ("gptoss", "tool_plan", "the template reads 'thinking': rename the field"),
        ("qwen3", "reasoning_content", None),
        ("qwen2_5", "reasoning_content", "remove the field"),
        ("cohere2", "timestamp", "remove the field"),
    ],
)
def test_a_field_is_read_by_the_template_or_refused_by_name(name: str, field: str, hint: str | None) -> None:
    tokenizer = tokenizer_for(name)
    call = {"tool_calls": [CALL]} if name == "gptoss" else {}  # it keeps thoughts beside calls alone
    answer = {"role": "assistant", "content": "" if call else "a", **call, field: "Hm."}
    example = make_example({"messages": [CHAT[0], answer]})
    if hint is None:
        row = encoder_of(tokenizer).encode(example, "x:1")
        assert "Hm." in "".join(trained_texts(row, tokenizer))
        return
    with pytest.raises(DataError, match=f"does not read '{field}' of a message; {hint}"):
        encoder_of(tokenizer).encode(example, "x:1")


def test_an_answer_ends_where_the_next_turn_is_opened_if_nothing_else_ends_it() -> None:
    glm = tokenizer_for("glm4moe")
    assert [glm.token_text(token) for token in end_of_turn_ids(glm)] == ["<|user|>"]
    oss = tokenizer_for("gptoss")
    assert [oss.token_text(token) for token in end_of_turn_ids(oss)] == ["<|return|>"]
    idefics = tokenizer_for("idefics3")
    assert [idefics.token_text(token) for token in end_of_turn_ids(idefics)] == ["<end_of_utterance>"]
