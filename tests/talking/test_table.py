"""generate over a table whose rows name adapters of one base: each answer is that of its adapter alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.support.tiny_pipelines import KINDS, saved_pipeline
from tests.talking.test_conversation import adapter_of, load, peft_folder
from tunekit.contracts import Sampling
from tunekit.errors import InputError, TunekitError
from tunekit.evaluation import choices
from tunekit.generate import PromptRow, answer, answer_with_adapters, generate_verb, read_prompts
from tunekit.objectives.rows import text as text_rows
from tunekit.talking.answer import Request
from tunekit.talking.conversation import Speaker, make_speaker
from tunekit.talking.table import answer_table

TEXTS = [f"Say {number} long things." for number in range(7)]
SETTINGS = ("evaluation.max_new_tokens=9", "evaluation.batch_size=3")


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters, one of a run, and two prompts with virtual tokens, one of them with its own embeddings."""
    from peft import PromptTuningConfig

    folder = tmp_path_factory.mktemp("table")
    adapter_of(tiny_llama, folder / "one", 1, use_dora=True)
    adapter_of(tiny_llama, folder / "run" / "adapter", 2)
    prompt = PromptTuningConfig(num_virtual_tokens=30, task_type="CAUSAL_LM")
    peft_folder(tiny_llama, folder / "prompt", 3, prompt)
    prompt = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", modules_to_save=["embed_tokens"])
    tensors = peft_folder(tiny_llama, folder / "embeddings", 4, prompt) / "adapter_model.safetensors"
    torch.manual_seed(5)
    save_file({name: part + torch.randn_like(part) / 9 for name, part in load_file(tensors).items()}, tensors)
    return folder


def write(folder: Path, adapters: list[Any]) -> Path:
    rows = [{"prompt": text, "adapter": name} for text, name in zip(TEXTS, adapters, strict=False)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder / "rows.jsonl"


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.3, 0.9, 0, 5)])
def test_each_row_has_the_answer_of_its_adapter_alone(folder: Path, tiny_llama: Path, sampling: Sampling) -> None:
    names = ["one", "run", None, "prompt", "run", str(folder / "one"), "embeddings"]
    rows = read_prompts(write(folder, names))
    answers = answer_with_adapters(load(tiny_llama, *SETTINGS), rows, sampling)
    for name in ("one", "run/adapter", None, "prompt", "embeddings"):
        alone = answer(load(tiny_llama if name is None else folder / name, *SETTINGS), TEXTS, sampling)
        places = [at for at, row in enumerate(rows) if row.adapter == (None if name is None else folder / name)]
        assert places
        assert [answers[at] for at in places] == [alone[at] for at in places]
    assert len({*answers}) >= 4


def test_answers_that_continue_a_text_are_those_of_generate(stories: Path, tmp_path: Path) -> None:
    """They start without a space, and may pass the stated number of positions, which are computed."""
    place = adapter_of(stories, tmp_path / "one", 1)
    texts = ["Once upon a time, there was a", "a " * 505]
    rows = [PromptRow(text, adapter) for text in texts for adapter in (None, place)]
    alone = [answer(load(row.adapter or stories, *SETTINGS), [row.prompt])[0] for row in rows]
    assert answer_with_adapters(load(stories, *SETTINGS), rows) == alone


def test_only_adapters_that_answer_are_in_memory(folder: Path, tiny_llama: Path, tmp_path: Path) -> None:
    places = [adapter_of(tiny_llama, tmp_path / f"a{number}", number) for number in range(5)]
    loaded = load(tiny_llama, *SETTINGS)
    speaker = make_speaker(loaded, needs_template=False)
    rows = [row.prompt for row in read_prompts(write(folder, [None] * 5))]
    prompts = [loaded.objective.rows.question(text) for text in rows]
    counts: list[int] = []
    hook = loaded.model.base.net.register_forward_hook(
        lambda *_: counts.append(sum(speaker.adapters.loaded(str(place)) is not None for place in places))
    )
    answer_table(speaker, [Request(max_new_tokens=4, prompt=ids) for ids in prompts], places, slots=2)
    hook.remove()
    assert max(counts) == 2


@pytest.mark.drawn
def test_adapters_that_cannot_be_loaded_together_answer_in_turns(
    folder: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """One copies the modules inside which the other has layers."""
    adapter_of(tiny_llama, tmp_path / "copy", 4, modules_to_save=["mlp"])
    names = [str(folder / "run"), str(tmp_path / "copy"), str(folder / "run"), str(tmp_path / "copy")]
    answers = answer_with_adapters(load(tiny_llama, *SETTINGS), read_prompts(write(folder, names)))
    for at, name in enumerate(names):
        place = Path(name) / "adapter" if name.endswith("run") else Path(name)
        assert answers[at] == answer(load(place, *SETTINGS), [TEXTS[at]])[0]


def test_all_wrong_adapters_are_named_before_the_first_answer(
    folder: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = shutil.copytree(folder / "run" / "adapter", tmp_path / "wide")
    config = wide / "adapter_config.json"
    config.write_text(config.read_text("utf-8").replace('"r": 4', '"r": 5'), "utf-8")
    broken = shutil.copytree(folder / "run" / "adapter", tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"x")
    other = shutil.copytree(folder / "run" / "adapter", tmp_path / "template")
    (other / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
    monkeypatch.setattr(Speaker, "answering", lambda *_: pytest.fail("a row was answered"))
    with pytest.raises(TunekitError, match=r"(?s)wide.*broken.*template: has its own chat template"):
        answer_with_adapters(
            load(tiny_llama, *SETTINGS), read_prompts(write(folder, [None, str(wide), "one", str(broken), str(other)]))
        )


def test_the_verb_prints_the_adapter_of_each_row(
    folder: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate_verb(str(tiny_llama), None, None, str(write(folder, ["run", None])), ["model.dtype=float32"], 3)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == TEXTS[:2]
    assert [line.get("adapter") for line in lines] == [str(folder / "run" / "adapter"), None]
    (folder / "rows.csv").write_text(f"prompt,adapter\n{TEXTS[0]},run\n{TEXTS[1]},\n", "utf-8")
    generate_verb(str(tiny_llama), None, None, str(folder / "rows.csv"), ["model.dtype=float32"], 3)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines


@pytest.mark.parametrize("name", ["none", 5, "."])
def test_a_row_without_such_an_adapter_is_refused(folder: Path, name: Any) -> None:
    with pytest.raises(TunekitError, match=r"rows\.jsonl:2.*contains no adapter"):
        read_prompts(write(folder, ["one", name]))


def test_a_misspelt_column_of_adapters_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "adaptor": "one"}\n', "utf-8")
    with pytest.raises(TunekitError, match=r"rows\.jsonl:1: 'adaptor' is not read; did you mean 'adapter'"):
        read_prompts(file)
    file.write_text('{"prompt": "a", "chapter": "one", "adapter": null}\n', "utf-8")
    assert read_prompts(file)[0].adapter is None


def test_a_target_that_chooses_answers_is_refused(folder: Path, tiny_llama: Path) -> None:
    rows = read_prompts(write(folder, ["one"]))
    with pytest.raises(TunekitError, match="does not generate texts"):
        answer_with_adapters(load(tiny_llama, "evaluation.choices=[a, b]"), rows)


def test_a_pipeline_refuses_rows_that_name_an_adapter(folder: Path, tmp_path: Path) -> None:
    rows, pipeline = write(folder, ["one"]), saved_pipeline(tmp_path / "pipeline", KINDS[0])
    with pytest.raises(TunekitError, match="draws images; the key adapter has no effect"):
        generate_verb(str(pipeline), None, None, str(rows), [])


def test_a_system_message_stands_before_each_prompt(
    folder: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The oracle is the tokenizer's own template."""
    loaded, turns = load(tiny_llama, *SETTINGS), [{"role": "system", "content": "Be short."}]
    turns.append({"role": "user", "content": TEXTS[0]})
    expected = AutoTokenizer.from_pretrained(tiny_llama).apply_chat_template(turns, add_generation_prompt=True)
    asked: list[Any] = []
    monkeypatch.setattr(text_rows, "generate_texts", lambda *args, **_: asked.extend(args[2]) or [[1]])
    generate_verb(str(tiny_llama), None, TEXTS[:1], None, ["model.dtype=float32"], system="Be short.")
    assert asked == [list(expected["input_ids"])]
    monkeypatch.undo()
    capsys.readouterr()
    rows = [PromptRow(TEXTS[0], place) for place in (None, folder / "one")]
    answers = answer_with_adapters(loaded, rows, system="Be short.")
    assert answers[0] == answer(loaded, TEXTS[:1], system="Be short.")[0] != answer(loaded, TEXTS[:1])[0]
    assert answers[1] == answer(load(folder / "one", *SETTINGS), TEXTS[:1], system="Be short.")[0]
    scored: list[Any] = []
    monkeypatch.setattr(choices, "choice_scores", lambda *args, **_: scored.extend(args[3]) or torch.zeros(1, 2))
    answer(load(tiny_llama, "evaluation.choices=[a, b]"), TEXTS[:1], system="Be short.")
    assert list(scored[0].prompt) == list(expected["input_ids"])


def test_a_system_message_that_nothing_reads_is_refused(stories: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the target reads no conversations, so --system has no effect; remove it"):
        generate_verb(str(stories), None, ["a"], None, [], system="Be short.")
    with pytest.raises(InputError, match="draws images; --system has no effect"):
        generate_verb(str(saved_pipeline(tmp_path / "pipeline", KINDS[0])), None, ["a"], None, [], system="Be short.")
