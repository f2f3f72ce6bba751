"""Answers as chat and serve make them: equal to generate's, whoever answers, whatever is kept from turn to turn."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tunekit.adapters.folder.config import TEMPLATE_NAME
from tunekit.chat import Chat, chat_verb, read_history
from tunekit.console import Console, visible
from tunekit.contracts import GREEDY, Sampling
from tunekit.errors import DataError, InputError, LengthError, TunekitError
from tunekit.formats.example import Message
from tunekit.generate import answer
from tunekit.talking.adapters import BASE
from tunekit.talking.answer import AnswerWriter, Reply, Request
from tunekit.talking.conversation import Speaker, make_speaker
from tunekit.targets.target import find_target, load_target

CPU = torch.device("cpu")
TARGETS = ["q_proj", "v_proj", "down_proj"]
QUESTION = [Message("user", "Say something long, please.")]


def load(target: Path, *overrides: str) -> Any:
    return load_target(find_target(str(target), None, ["model.dtype=float32", *overrides]), CPU)


def adapter_of(base: Path, folder: Path, seed: int, **settings: Any) -> Path:
    """A LoRA as peft writes it, that says other things than its base."""
    from peft import LoraConfig

    settings = {"r": 4, "target_modules": TARGETS, "init_lora_weights": False} | settings
    return peft_folder(base, folder, seed, LoraConfig(**settings))


def peft_folder(base: Path, folder: Path, seed: int, config: Any) -> Path:
    """A new adapter as peft writes it."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.fixture
def speaker(tiny_llama: Path, tmp_path: Path) -> Speaker:
    """The tiny model with two adapters that answer otherwise than it and each other."""
    found = make_speaker(load(adapter_of(tiny_llama, tmp_path / "one", seed=1)), "one")
    found.adapters.add("two", adapter_of(tiny_llama, tmp_path / "two", seed=2))
    return found


def ask(speaker: Speaker, name: str, messages: list[Message], count: int = 12, **more: Any) -> str:
    (reply,) = speaker.answer([Request(messages, count, **more)], name)
    return reply.text


def test_everyone_answers_as_generate_does(tiny_llama: Path, tmp_path: Path, speaker: Speaker) -> None:
    settings = "evaluation.max_new_tokens=12"
    alone = {"base": load(tiny_llama, settings), "one": load(tmp_path / "one", settings)}
    alone["two"] = load(tmp_path / "two", settings)
    answers = {name: answer(target, [QUESTION[0].content])[0] for name, target in alone.items()}
    assert len(set(answers.values())) == 3
    for name in ("two", "base", "one", "two"):
        assert ask(speaker, name, QUESTION) == answers[name]
    assert speaker.adapters.names == [BASE, "one", "two"]
    assert speaker.default == "one"
    with pytest.raises(InputError, match="no adapter 'three'"):
        ask(speaker, "three", QUESTION)


def test_what_is_kept_from_the_turn_before_changes_no_answer(speaker: Speaker) -> None:
    messages = list(QUESTION)
    for turn in range(3):
        kept = ask(speaker, "one", messages)
        lengths = {len(states.ids) for _, states in speaker.states.values()}
        speaker.states.clear()
        assert ask(speaker, "one", messages) == kept
        assert lengths == {len(states.ids) for _, states in speaker.states.values()}
        messages += [Message("assistant", kept), Message("user", f"And {turn}?")]
    ask(speaker, "one", [Message("user", "Say another thing.")])  # shares its beginning only
    assert ask(speaker, "one", messages[:-2]) == messages[-2].content


def test_a_long_neighbour_takes_no_room_from_a_short_one(speaker: Speaker) -> None:
    long = [Message("user", "word " * 90)]
    requests = [Request(QUESTION, 60), Request(long, 60)]
    assert speaker.answer(requests, "two") == [speaker.answer([each], "two")[0] for each in requests]


def test_a_temperature_near_zero_is_greedy(speaker: Speaker) -> None:
    assert ask(speaker, "one", QUESTION, sampling=Sampling(1e-300, 1.0, 0, 1)) == ask(speaker, "one", QUESTION)


def test_each_adapter_uses_its_own_template(tiny_llama: Path, tmp_path: Path) -> None:
    """An adapter answers as alone, also next to a target with a template; the base uses the target's."""
    plain, other = (
        "{% for m in messages %}" + text + "{% endfor %}" for text in ("{{ m.content }}", "Q: {{ m.content }}A:")
    )
    for seed, (name, template) in enumerate({"own": plain, "other": other, "without": None}.items()):
        adapter_of(tiny_llama, tmp_path / name, seed)
        if template is not None:
            (tmp_path / name / TEMPLATE_NAME).write_text(template, "utf-8")
    speaker = make_speaker(load(tmp_path / "own"), "own")
    for name in ("other", "without"):
        speaker.adapters.add(name, tmp_path / name)
    for name in ("own", "other", "without"):
        alone = load(tmp_path / name, "evaluation.max_new_tokens=12")
        assert ask(speaker, name, QUESTION) == answer(alone, [QUESTION[0].content])[0]
    lengths = {name: len(speaker.prepare(Request(QUESTION), name).prompt) for name in speaker.adapters.names}
    assert lengths["base"] == lengths["own"]
    assert len({*lengths.values()}) == 3
    (tmp_path / "other" / TEMPLATE_NAME).write_bytes(b"\xff")
    with pytest.raises(TunekitError, match="cannot be read"):
        ask(speaker, "other", QUESTION)


def test_the_first_of_several_stop_texts_ends_the_answer() -> None:
    writer = AnswerWriter(lambda ids, **_: "one b a"[: 7 * len(ids)], Request(QUESTION, 9, stop=["a", "b"]))
    assert [writer.add(5).text, writer.finish().text, writer.reason] == ["", "one ", "stop"]


def test_an_adapter_called_base_does_not_hide_behind_the_base(tiny_llama: Path, tmp_path: Path) -> None:
    found = make_speaker(load(adapter_of(tiny_llama, tmp_path / "base", seed=1)), "base")
    assert (found.adapters.names, found.default) == ([BASE, "adapter"], "adapter")


def test_several_are_answered_side_by_side(speaker: Speaker) -> None:
    others = [[Message("user", text)] for text in ("a", "Tell me more of it, will you?", "What is it?")]
    alone = [ask(speaker, "two", messages, 5 + at) for at, messages in enumerate(others)]
    shown = ["", "", ""]

    def on_text(row: int, text: str) -> bool:
        shown[row] += text
        return True

    replies = speaker.answer([Request(m, 5 + at) for at, m in enumerate(others)], "two", on_text)
    assert [reply.text for reply in replies] == alone == shown
    assert [reply.new_tokens for reply in replies] == [5, 6, 7]
    assert {reply.reason for reply in replies} == {"length"}


def test_a_request_that_joins_late_ends_early_and_changes_no_answer(speaker: Speaker) -> None:
    """It has another adapter, other sampling settings and another length."""
    requests = [Request(QUESTION, 40), Request([Message("user", "a")], 3, Sampling(1.5, 0.9, 0, 7))]
    names, replies, events = ("two", "one"), dict[int, Reply](), list[int]()
    alone = [speaker.answer([request], name)[0] for request, name in zip(requests, names, strict=True)]
    with speaker.answering(2, 512) as answers:
        for row, (request, name) in enumerate(zip(requests, names, strict=True)):
            answers.put(
                speaker.prepare(request),
                name,
                lambda piece, row=row: events.append(row) or True,  # type: ignore[misc]
                partial(replies.__setitem__, row),
            )
            for _ in range(4):
                answers.step()
        assert list(replies) == [1]
        assert answers.free_slots == 1
        while answers.is_busy:
            answers.step()
    assert [replies[0], replies[1]] == alone
    assert events.index(1) <= 5


def test_a_prompt_longer_than_a_slot_is_refused_and_a_long_answer_is_cut(speaker: Speaker) -> None:
    replies: list[Reply] = []
    with speaker.answering(1, 64) as answers:
        with pytest.raises(LengthError, match="which leave no room for an answer"):
            answers.put(speaker.prepare(Request([Message("user", "x" * 80)], 4)), "one", lambda _: True, replies.append)
        answers.put(speaker.prepare(Request(QUESTION, 400)), "one", lambda _: True, replies.append)
        while answers.is_busy:
            answers.step()
    assert (replies[0].reason, replies[0].prompt_tokens + replies[0].new_tokens) == ("length", 65)


def test_a_prompt_is_measured_before_it_is_tokenized(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer lets no other thread run: of 4 MB it reads as much as shows that they are too long."""
    read: list[int] = []
    tokenizer = speaker.target.tokenizer
    encode = tokenizer.encode_with_offsets
    monkeypatch.setattr(tokenizer, "encode_with_offsets", lambda text, **_: read.append(len(text)) or encode(text, **_))
    for messages in (
        [Message("user", "word ladder " * 300_000)],
        [Message("user", "<|im_start|>" * 300_000)],
        [Message("user", "a")] * 100_000,
    ):
        with pytest.raises(LengthError, match="has more than 512 tokens, but the model reads at most 512"):
            speaker.prepare(Request(messages))
    assert sum(read) < 200_000
    with pytest.raises(LengthError, match="has 519 tokens, but the model reads at most 512"):
        speaker.prepare(Request([Message("user", "x" * 500)]))
    assert len(speaker.prepare(Request([Message("user", "x" * 490)])).prompt) == 509


def test_an_answer_ends_before_a_stop_text_and_where_nobody_listens(speaker: Speaker) -> None:
    whole = ask(speaker, "one", QUESTION, 30)
    stop = whole[10:13]
    (reply,) = speaker.answer([Request(QUESTION, 30, stop=(stop,))], "one")
    assert reply.text == whole[: whole.index(stop)]
    assert reply.reason == "stop"
    (reply,) = speaker.answer([Request(QUESTION, 30)], "one", lambda row, text: False)
    assert 0 < reply.new_tokens < 5


def test_sampling_follows_its_seed(speaker: Speaker) -> None:
    texts = [ask(speaker, "one", QUESTION, sampling=Sampling(1.5, 1.0, 0, seed)) for seed in (0, 1, 0)]
    assert texts[0] == texts[2] != texts[1]
    assert ask(speaker, "one", QUESTION, sampling=GREEDY) not in texts[:2]


def test_a_conversation_in_the_terminal(speaker: Speaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = tmp_path / "talk.jsonl"
    chat = Chat(speaker, Console(), "one", GREEDY, 8, history)
    chat.line("/system You are brief.")
    chat.line("/undo")
    chat.line(QUESTION[0].content)
    shown = capsys.readouterr().out
    reply = chat.messages[-1].content
    assert shown.startswith(visible(reply))
    assert "[ended at 8 tokens" in shown
    chat.line("/base")
    assert capsys.readouterr().out.startswith(visible(ask(speaker, BASE, chat.messages[:2], 8)))
    assert [message.role for message in read_history(history)] == ["system", "user", "assistant"]
    chat.line("/adapter two")
    chat.line("Once more")
    assert chat.messages[-1].content == ask(speaker, "two", chat.messages[:-1], 8)
    chat.line("/undo")
    assert [message.role for message in chat.messages] == ["system", "user", "assistant"]
    chat.line("/exit")
    assert chat.ended
    chat.line("/reset")
    assert [message.role for message in read_history(history)] == ["system"]
    chat.line("/set temperature 0.5")
    assert chat.sampling.temperature == 0.5
    for line, said in (("/sett", "no command"), ("/set heat 1", "no setting"), ("/set top_p 2", "out of range")):
        with pytest.raises(InputError, match=said):
            chat.line(line)
    turn = {"role": "assistant", "content": "", "tool_calls": []}
    for damaged in ("[]", json.dumps({"messages": [turn]}), json.dumps({"messages": [], "tools": []})):
        history.write_text(damaged, encoding="utf-8")
        with pytest.raises(DataError, match="contains no conversation"):
            read_history(history)


def test_save_replaces_no_file_of_the_user(tmp_path: Path) -> None:
    rows, saved = tmp_path / "train.jsonl", tmp_path / "talk.jsonl"
    rows.write_text("{}\n{}\n", encoding="utf-8")
    chat = Chat(cast("Speaker", None), Console(), "one", GREEDY, 8, None)
    with pytest.raises(InputError, match=r"train\.jsonl exists; name a new file"):
        chat.line(f"/save {rows}")
    assert rows.read_text("utf-8") == "{}\n{}\n"
    chat.line(f"/save {saved}")
    chat.line(f"/save {saved}")
    assert read_history(saved) == []
    saved.chmod(0o600)
    (tmp_path / "link").symlink_to(saved)
    chat.history = tmp_path / "link"
    chat.line("/system You are brief.")
    chat.line("/reset")
    assert (tmp_path / "link").is_symlink()
    assert [message.role for message in read_history(saved)] == ["system"]
    assert saved.stat().st_mode & 0o777 == 0o600


def test_chat_says_who_answers(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = {
        str(tiny_llama): "the base. ",
        str(adapter_of(tiny_llama, tmp_path / "one", 1)): "the tuned model; /base ",
    }
    for target, text in targets.items():
        monkeypatch.setattr("sys.stdin", io.StringIO(""))
        chat_verb(target, None, [], [], None, None, (0.0, 1.0, 0, 0), None)
        assert f"You are chatting with {text}" in capsys.readouterr().out


def test_an_interrupted_answer_is_kept_and_the_next_one_right(
    speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(speaker, Console(), "one", GREEDY, 8)
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chat.console, "write", write)
        chat.line(QUESTION[0].content)
    assert visible(chat.messages[-1].content) == "".join(written[:3])
    assert visible(ask(speaker, "one", QUESTION, 8)).startswith("".join(written[:3]))
    chat.line("Go on.")
    assert chat.messages[-1].content == ask(speaker, "one", chat.messages[:-1], 8)


def read_terminal(terminal: int, until: str, key: bytes = b"") -> str:
    """The output of a terminal up to a text. `key`: pressed now, and again every second: Python's readline misses a
    signal that comes just before it waits for a character."""
    text = ""
    for _ in range(300):
        os.write(terminal, key)
        while select.select([terminal], [], [], 1)[0]:
            text += os.read(terminal, 4096).decode()
            if until in text:
                return text
    raise AssertionError(f"{until!r} did not come after {text!r}")


TYPING = """
import time
from types import SimpleNamespace
from tunekit import chat
from tunekit.console import Console

def line(text):
    talk.ended = text == "/exit"
    try:
        print("LINE", repr(text), flush=True)
        time.sleep(300 * (text == "wait"))
    except KeyboardInterrupt:
        print("STOPPED", flush=True)

talk = SimpleNamespace(ended=False, line=line)
chat._talk(talk, Console())
"""


@pytest.mark.slow
def test_text_typed_before_ctrl_c_is_kept() -> None:
    """At the prompt, and while an answer is written; in a terminal."""
    pty = pytest.importorskip("pty")
    child, terminal = pty.fork()
    if not child:
        os.execv(sys.executable, [sys.executable, "-c", TYPING])
    try:
        read_terminal(terminal, "> ")
        os.write(terminal, b"Hello wor")
        read_terminal(terminal, "wor")
        read_terminal(terminal, "> Hello wor", key=b"\x03")
        os.write(terminal, b"ld\n")
        read_terminal(terminal, "LINE 'Hello world'")
        os.write(terminal, b"wait\n")
        read_terminal(terminal, "LINE 'wait'")
        os.write(terminal, b"/ex")
        read_terminal(terminal, "/ex")
        read_terminal(terminal, "STOPPED", key=b"\x03")
        os.write(terminal, b"it\n")
        read_terminal(terminal, "LINE '/exit'")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(terminal)
