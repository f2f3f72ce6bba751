"""`--to ollama`: the Modelfile and its GGUF files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.arithmetic.test_merge import write_base
from tests.exports.test_gguf import adapter_of, read
from tests.exports.test_gguf_composite import EVIDENCE, NO_ADAPTER, write_case
from tests.support.composite_case import SHAPES
from tunekit.errors import InputError
from tunekit.export import export_verb
from tunekit.exports import ollama
from tunekit.exports.format import Options
from tunekit.exports.llama_cpp.converter import converter_folder

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    try:
        converter_folder()
    except InputError as error:
        pytest.skip(error.problems[0].what)
    folder = write_base(tmp_path / "base", "llama")
    (folder / "chat_template.jinja").write_text(CHATML)
    settings = {"do_sample": True, "temperature": 0.2, "repetition_penalty": 1.1, "eos_token_id": [1, 2]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def test_the_folder_has_base_adapter_and_modelfile(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter")
    export_verb(str(adapter), "ollama", str(tmp_path / "small"), certify=False)
    lines = (tmp_path / "small" / "Modelfile").read_text("utf-8")
    assert lines.startswith('FROM ./base.gguf\nADAPTER ./adapter.gguf\nTEMPLATE """{{ range $i, $_ := .Messages }}')
    assert '{{ if eq .Role "user" }}{{ "<|im_start|>user\\n" }}{{ .Content }}{{ "<|im_end|>\\n" }}{{ end }}' in lines
    assert "PARAMETER temperature 0.2\nPARAMETER repeat_penalty 1.1\n" in lines
    assert len(re.findall("^PARAMETER stop ", lines, re.MULTILINE)) == 2
    assert read(tmp_path / "small" / "adapter.gguf")[1]["general.type"] == "adapter"
    assert read(tmp_path / "small" / "base.gguf")[1]["general.architecture"] == "llama"


def test_a_setting_that_is_no_number_is_no_directive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollama, "_turns", lambda exportable: None)
    monkeypatch.setattr(ollama, "_stops", lambda exportable, ends: [])
    settings = {"do_sample": True, "temperature": "1\nSYSTEM injected", "top_k": True, "top_p": 0.5}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    base: Any = SimpleNamespace(folder=tmp_path, gguf_file=None)
    assert ollama._settings(base)[1:] == ["PARAMETER top_p 0.5"]


def test_a_type_writes_one_merged_model(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter")
    export_verb(str(adapter), "ollama", str(tmp_path / "small"), None, Options(type="Q8_0"), certify=False)
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["Modelfile", "model.gguf"]
    assert (tmp_path / "small" / "Modelfile").read_text("utf-8").startswith("FROM ./model.gguf\nTEMPLATE ")


@pytest.mark.usefixtures("installed")
@pytest.mark.sampled(1)
@pytest.mark.parametrize("model_type", SHAPES)
def test_a_composite_base_gives_its_language_model(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = NO_ADAPTER.get(model_type, "all-linear")
    exportable = write_case(model_type, tmp_path, monkeypatch, target_modules=adapted)
    for options, files in ((Options(), ("base.gguf", "adapter.gguf")), (Options(type="F32"), ("model.gguf",))):
        assert ollama.problems(exportable, options) == []
        folder = tmp_path / str(options.type)
        written = ollama.write(exportable, folder, EVIDENCE, options)
        assert any("without the parts that read images or audio" in note for note in written.notes)
        assert {path.name for path in folder.iterdir()} == {"Modelfile", *files}
        lines = (folder / "Modelfile").read_text("utf-8")
        assert re.findall(r"^(?:FROM|ADAPTER) \./(.+)", lines, re.MULTILINE) == [*files]
        assert '<|im_start|>user\\n" }}{{ .Content }}' in lines
        assert 'PARAMETER stop "<|im_end|>"' in lines
        assert not [name for name in read(folder / files[0])[0] if name.startswith(("v.", "mm."))]


def test_what_ollama_leaves_out_without_a_word_is_noted(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_verb(str(base), "ollama", str(tmp_path / "with"), certify=False)
    assert "leaves out" not in capsys.readouterr().out
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    trimming = CHATML.replace("message.content", "message.content | trim")
    (base / "chat_template.jinja").write_text(refusal + trimming)
    export_verb(str(base), "ollama", str(tmp_path / "without"), certify=False)
    written = " ".join(capsys.readouterr().out.split())
    assert "has no system message, so Ollama leaves out SYSTEM" in written
    assert "removes spaces around a message, and Ollama does not" in written


def test_a_template_that_is_a_program_is_refused(base: Path, tmp_path: Path) -> None:
    (base / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ loop.index }} {{ message.content }}{% endfor %}"
    )
    with pytest.raises(InputError, match="writes more than fixed texts around each message"):
        export_verb(str(base), "ollama", str(tmp_path / "small"))
    assert not (tmp_path / "small").exists()
