"""A run or an adapter folder that is moved: its chat template goes with it, and its base is found where it is now."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import write_tiny_llama
from tests.support.train_case import train_in_child, write_recipe
from tunekit.contracts import EncodeOptions
from tunekit.errors import AdapterError, ModelError
from tunekit.evaluate import evaluate_verb
from tunekit.export import export_verb
from tunekit.machine.devices import make_devices
from tunekit.targets.target import LoadedTarget, find_target, load_target

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def run(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))
    recipe = write_recipe(tmp_path, tiny_llama)
    (tmp_path / "own.jinja").write_text(TEMPLATE, encoding="utf-8")
    ended = train_in_child(recipe, tmp_path / "run", f"data.chat_template={tmp_path / 'own.jinja'}")
    assert ended.code == 0, ended.output
    return tmp_path / "run"


def test_peft_loads_the_adapter_and_its_local_base_from_any_folder(
    run: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import AutoPeftModelForCausalLM

    monkeypatch.chdir("/")
    loaded = AutoPeftModelForCausalLM.from_pretrained(run / "adapter")
    assert loaded.peft_config["default"].base_model_name_or_path == str(tiny_llama)


def test_a_moved_run_uses_the_base_that_has_its_fingerprint(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(tiny_llama, here / "models" / "base")
    (here / "runs").mkdir()
    ended = train_in_child(write_recipe(here, here / "models" / "base"), here / "runs" / "run", "training.epochs=0.5")
    assert ended.code == 0, ended.output
    shutil.copytree(here, there)
    write_tiny_llama(here / "models" / "base", seed=1)  # the old place now holds another model

    def base_of(target: Path) -> str:
        return find_target(str(target), None, []).model.name_or_path

    assert base_of(there / "runs" / "run") == base_of(there / "runs" / "run" / "adapter") == str(there / "models/base")
    shutil.move(there / "models" / "base", there / "runs" / "base")
    assert base_of(there / "runs" / "run") == str(there / "runs" / "base")
    shutil.rmtree(there / "runs" / "base")
    assert base_of(there / "runs" / "run") == str(here / "models" / "base")  # loading says that it is another one
    shutil.rmtree(here / "models")
    with pytest.raises(ModelError, match=r"belongs to .*models/base, which was not found; name the base with --base"):
        base_of(there / "runs" / "run")


def test_an_exported_adapter_without_a_path_uses_a_base_near_it(run: Path, tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "exports" / "vllm"
    export_verb(str(run), "vllm", str(out), certify=False)
    base = shutil.copytree(tiny_llama, tmp_path / tiny_llama.name)
    assert find_target(str(out), None, []).model.name_or_path == str(base)


def prompt_of(loaded: LoadedTarget) -> str:
    kind = loaded.objective.rows.with_options(EncodeOptions(template=loaded.target.chat_template))
    return loaded.tokenizer.decode(kind.question("q"))


@pytest.mark.drawn
def test_the_template_goes_with_the_adapter(run: Path, tiny_llama: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "adapter"
    shutil.copytree(run / "adapter", moved)
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "that"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    (tmp_path / "own.jinja").unlink()  # the run, too, needs only its own folder
    values = []
    for target in (run, moved):
        place = tmp_path / "values.json"
        evaluate_verb(str(target), str(tiny_llama), str(rows), None, [], str(place), [])
        values.append(json.loads(place.read_text()))
        loaded = load_target(find_target(str(target), str(tiny_llama), []), make_devices().device)
        assert prompt_of(loaded) == "[user] q<|im_end|>[assistant] "
    assert values[0] == values[1]


def test_a_changed_template_is_refused_and_peft_reads_the_folder(run: Path, tiny_llama: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), run / "adapter")
    (run / "adapter" / "chat_template.jinja").write_text("other", encoding="utf-8")
    with pytest.raises(AdapterError, match=r"chat_template\.jinja.*is different from the file that tunekit wrote"):
        load_target(find_target(str(run), None, []), make_devices().device)
