"""Adapters by name: loaded at first use, evicted under a limit, added while the program runs."""

from __future__ import annotations

import gc
import os
import queue
import shutil
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.talking.test_conversation import QUESTION, adapter_of, ask, load, peft_folder
from tunekit.errors import AdapterConflict, AdapterError, InputError
from tunekit.formats.example import Message
from tunekit.talking.adapters import PART_BYTES
from tunekit.talking.answer import Reply, Request
from tunekit.talking.conversation import Answers, Speaker, make_speaker
from tunekit.talking.desk import Desk, Job


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for seed, name in enumerate(("one", "two", "three")):
        adapter_of(tiny_llama, folder / name, seed)
    return folder


@pytest.fixture
def speaker(tiny_llama: Path, folder: Path) -> Speaker:
    speaker = make_speaker(load(tiny_llama))
    speaker.adapters.add_folder(str(folder))
    return speaker


def loaded(speaker: Speaker) -> list[str]:
    return [name for name in speaker.adapters.names if speaker.adapters.loaded(name) is not None]


def test_an_adapter_is_loaded_when_it_is_used_and_the_oldest_one_evicted(speaker: Speaker) -> None:
    assert speaker.adapters.names == ["base", "one", "three", "two"]
    assert loaded(speaker) == []
    first = {name: ask(speaker, name, QUESTION) for name in ("one", "two", "three")}
    assert len(set(first.values())) == 3
    size = bytes_of(speaker, "one")
    speaker.adapters.limit_bytes = 2 * size
    for name, others in (("one", ["one", "three"]), ("two", ["one", "two"]), ("three", ["three", "two"])):
        assert ask(speaker, name, QUESTION) == first[name]
        assert sorted(loaded(speaker)) == sorted(others)
        assert {*speaker.states} <= {*others}  # an evicted adapter's conversation would keep it in memory
    assert speaker.adapters.nbytes == 2 * size
    plain = [type(module).__name__ for module in speaker.target.model.base.net.modules()]
    speaker.adapters.limit_bytes = 0
    speaker.adapters.load("base")
    assert loaded(speaker) == []
    assert "Switch" in plain
    assert "Switch" not in [type(module).__name__ for module in speaker.target.model.base.net.modules()]


def test_an_adapter_in_use_is_not_evicted(speaker: Speaker) -> None:
    speaker.adapters.limit_bytes = 0
    for name in ("one", "two", "three"):
        speaker.adapters.load(name, {"one"})
    assert sorted(loaded(speaker)) == ["one", "three"]


def test_a_new_adapter_of_a_folder_needs_no_restart(speaker: Speaker, folder: Path, tiny_llama: Path) -> None:
    assert not speaker.adapters.knows("late")
    adapter_of(tiny_llama, folder / "late", 9)
    assert speaker.adapters.knows("late")
    assert ask(speaker, "late", QUESTION) != ask(speaker, "one", QUESTION)
    shutil.rmtree(folder / "late")
    speaker.adapters.limit_bytes = 0
    speaker.adapters.load("base")
    speaker.adapters.read_folders()
    assert not speaker.adapters.knows("late")


def test_an_adapter_that_is_trained_again_is_loaded_again(speaker: Speaker, folder: Path, tiny_llama: Path) -> None:
    before = ask(speaker, "one", QUESTION)
    adapter_of(tiny_llama, folder / "one", 10)
    try:
        assert ask(speaker, "one", QUESTION) != before
    finally:
        adapter_of(tiny_llama, folder / "one", 0)
    assert ask(speaker, "one", QUESTION) == before


def test_a_changed_configuration_alone_is_noticed(speaker: Speaker, folder: Path) -> None:
    before, config = ask(speaker, "two", QUESTION), folder / "two" / "adapter_config.json"
    text = config.read_text("utf-8")
    config.write_text(text.replace('"lora_alpha": 8', '"lora_alpha": 80'), "utf-8")
    assert config.read_text("utf-8") != text
    assert ask(speaker, "two", QUESTION) != before
    config.write_text(text, "utf-8")
    assert ask(speaker, "two", QUESTION) == before


def bytes_of(speaker: Speaker, name: str) -> int:
    """The memory of one adapter: its tensors, and Python's objects."""
    attached = speaker.adapters.loaded(name)
    assert attached is not None
    return sum(tensor.nbytes for tensor in attached.state().values()) + PART_BYTES * len(attached.parts())


def answer_together(speaker: Speaker, names: list[str], tokens: int = 6) -> list[int]:
    """Answer a request to each adapter at the same time; returns the memory of adapters after each token."""
    sizes = []
    with speaker.answering(len(names), 512) as answers:
        for name in names:
            answers.put(speaker.prepare(Request(QUESTION, tokens)), name, lambda piece: True, lambda reply: None)
        while answers.is_busy:
            answers.step()
            sizes.append(speaker.adapters.nbytes)
    return sizes


def test_copies_of_factors_count_as_memory_of_adapters(speaker: Speaker) -> None:
    """They are freed when no answer runs, and idle adapters are evicted for them."""
    sizes = answer_together(speaker, ["one", "two", "three"])
    assert max(sizes) > sizes[-1] == 3 * bytes_of(speaker, "one")
    speaker.adapters.limit_bytes = speaker.adapters.nbytes
    sizes = answer_together(speaker, ["one", "two"])
    assert speaker.adapters.limit_bytes >= max(sizes) > sizes[-1]
    assert sorted(loaded(speaker)) == ["one", "two"]


@pytest.mark.parametrize("room", [0.0, 0.7, 1.5])
def test_copies_of_factors_stay_within_the_limit(speaker: Speaker, room: float) -> None:
    """`room`: the memory for copies, in sizes of an adapter. Without memory for them, the answers are the same."""
    names, replies = ["one", "two", "three"], dict[str, Reply]()
    alone = {name: ask(speaker, name, QUESTION, 6) for name in names}
    size = bytes_of(speaker, "one")
    speaker.adapters.limit_bytes = limit = int((3 + room) * size)
    sizes = []
    with speaker.answering(3, 512) as answers:
        for name in names:
            request = speaker.prepare(Request(QUESTION, 6))
            answers.put(request, name, lambda piece: True, partial(replies.__setitem__, name))
            answers.step()
            sizes.append(speaker.adapters.nbytes)
        while answers.is_busy:
            answers.step()
            sizes.append(speaker.adapters.nbytes)
    assert max(sizes) <= limit
    assert (max(sizes) > 3 * size) == (room > 0)
    assert {name: reply.text for name, reply in replies.items()} == alone


def test_an_evicted_adapter_is_freed_at_once(speaker: Speaker, tiny_llama: Path, tmp_path: Path) -> None:
    """Its layers refer to each other: Python's collector alone would free them much later."""
    place = adapter_of(tiny_llama, tmp_path / "wide", 3, target_modules="all-linear")
    speaker.adapters.add("wide", place)
    ask(speaker, "wide", QUESTION)
    answer_together(speaker, ["wide", "one"])
    alive = [weakref.ref(tensor) for tensor in speaker.adapters.loaded("wide").trained().values()]  # type: ignore[union-attr]
    gc.collect()
    gc.disable()
    try:
        speaker.adapters.limit_bytes = 0
        speaker.adapters.load("base")
        assert [ref() for ref in alive if ref() is not None] == []
    finally:
        gc.enable()


def test_an_adapter_that_conflicts_with_an_idle_one_replaces_it(
    speaker: Speaker, tiny_llama: Path, tmp_path: Path
) -> None:
    """It copies modules inside which the other one has layers."""
    speaker.adapters.add("copy", adapter_of(tiny_llama, tmp_path / "copy", 7, modules_to_save=["mlp"]))
    first = ask(speaker, "copy", QUESTION)
    assert ask(speaker, "one", QUESTION) != first
    assert loaded(speaker) == ["one"]
    assert ask(speaker, "copy", QUESTION) == first
    speaker.adapters.load("copy")
    with pytest.raises(AdapterConflict, match="cannot be loaded at once"):
        speaker.adapters.load("one", {"copy"})


def test_requests_to_adapters_that_conflict_take_turns(speaker: Speaker, tiny_llama: Path, tmp_path: Path) -> None:
    speaker.adapters.add("copy", adapter_of(tiny_llama, tmp_path / "copy", 7, modules_to_save=["mlp"]))
    names, ended = ["copy", "one", "copy", "two"], queue.SimpleQueue[Any]()
    alone = [ask(speaker, name, QUESTION) for name in names]
    desk = Desk(speaker, 4, 512)
    desk.put([Job(Request(QUESTION, 12), name, lambda piece: None, ended.put) for name in names])
    replies = [ended.get(timeout=60) for _ in names]
    desk.close()
    assert [reply for reply in replies if not isinstance(reply, Reply)] == []
    assert sorted(reply.text for reply in replies) == sorted(alone)


def test_an_unreadable_folder_hides_no_adapter(speaker: Speaker, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "lost+found").mkdir(exist_ok=True)
    stat = os.stat

    def refuse(path: Any, **more: Any) -> os.stat_result:
        if "lost+found/" in str(path):
            raise PermissionError(13, "Permission denied")
        return stat(path, **more)

    monkeypatch.setattr(os, "stat", refuse)
    speaker.adapters.read_folders()
    assert speaker.adapters.names == ["base", "one", "three", "two"]


@pytest.mark.drawn
def test_keys_and_values_fit_into_the_memory(speaker: Speaker) -> None:
    """Those of running answers, of the last prompts, and of cached conversations."""
    for slots, memory_bytes in ((2, 400_000), (2, 1_000_000), (1, 10**9)):
        tokens, used = speaker.slot_tokens(slots, memory_bytes)
        assert used <= memory_bytes
        assert 32 <= tokens <= 512
        speaker.cache_limit = tokens
        sizes = []
        with speaker.answering(slots, tokens) as answers:
            for name in ("base", "one", "two", "three"):
                request = speaker.prepare(Request(QUESTION, 512))
                answers.put(request, name, lambda piece: True, lambda reply: None)
                while answers.is_busy:
                    answers.step()
                sizes.append(answers.decoder.nbytes + bytes_of_caches(speaker, answers))
        assert max(sizes) <= used
        speaker.states.clear()


def bytes_of_caches(speaker: Speaker, answers: Answers) -> int:
    prefill = answers.decoder._slot_batch._prefill  # type: ignore[union-attr]
    layers = [layer for _, states in speaker.states.values() for layer in states.layers]
    return sum(part.nbytes for layer in layers for part in layer) + (prefill.slots.nbytes if prefill else 0)


def test_requests_to_many_adapters_share_forwards(speaker: Speaker, tiny_llama: Path, tmp_path: Path) -> None:
    """Of any ranks and targets, with the base and a method that is not additive; a prompt has its own forwards. Each
    answer is that of the request alone."""
    from peft import PromptTuningConfig

    wide = {"r": 7, "lora_alpha": 3, "use_rslora": True, "target_modules": "all-linear"}
    for seed, (name, settings) in enumerate({"wide": wide, "dora": {"use_dora": True}}.items()):
        speaker.adapters.add(name, adapter_of(tiny_llama, tmp_path / name, seed, **settings))
    prompt = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    speaker.adapters.add("prompt", peft_folder(tiny_llama, tmp_path / "prompt", 5, prompt))
    names = ["one", "wide", "dora", "base", "two", "prompt", "wide", "three", "one"]
    questions = [[Message("user", f"Say {number} long things, please.")] for number in range(len(names))]
    alone = [ask(speaker, name, question, 12) for name, question in zip(names, questions, strict=True)]
    sizes: list[int] = []
    hook = speaker.target.model.base.net.register_forward_hook(lambda module, inputs, output: sizes.append(1))
    replies: dict[int, Reply] = {}
    with speaker.answering(len(names), 512) as answers:
        for row, (name, question) in enumerate(zip(names, questions, strict=True)):
            request = speaker.prepare(Request(question, 12))
            answers.put(request, name, lambda piece: True, partial(replies.__setitem__, row))
            if row == 4:
                answers.step()  # the others join later
        while answers.is_busy:
            answers.step()
    hook.remove()
    assert [replies[row].text for row in range(len(names))] == alone
    assert len({*alone}) >= len({*names})
    assert len(sizes) < 40, "nine requests of 12 tokens alone need 108"


def test_wrong_names_and_folders(speaker: Speaker, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no adapter 'none'"):
        speaker.adapters.load("none")
    with pytest.raises(InputError, match="the name of its adapter 'one' is already in use"):
        speaker.adapters.add_folder(str(folder))
    shutil.copytree(folder / "one", tmp_path / "broken")
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(AdapterError):
        speaker.adapters.add_folder(str(tmp_path / "broken"))
    assert "broken" not in speaker.adapters.names
    assert torch.is_grad_enabled()
