"""A base that is a GGUF file in a folder with another model: nothing of that model is exported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.arithmetic.test_merge import write_base
from tests.exports.test_gguf import evidence, exportable
from tunekit.errors import InputError
from tunekit.exports import ctranslate2, gguf, ollama, onnx
from tunekit.exports.format import Options
from tunekit.exports.llama_cpp.converter import converter_folder
from tunekit.exports.plain_or_merged import plain_or_reason


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        converter_folder()
    except InputError as error:
        pytest.skip(error.problems[0].what)
    folder = write_base(tmp_path_factory.mktemp("gguf") / "base", "llama")
    gguf.write(exportable(folder), folder / "x.gguf", evidence(), Options(type="F32"))
    settings = {"do_sample": True, "temperature": 0.2, "eos_token_id": [1, 2]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.model").write_bytes(b"of another model")
    return folder / "x.gguf"


def test_a_program_s_converter_does_not_get_the_model_next_to_it(base: Path) -> None:
    target = exportable(base)
    for format in (onnx, ctranslate2):
        texts = [str(problem) for problem in format.problems(target, Options())]
        assert any("the model is a GGUF file, which the converter does not read" in text for text in texts)


def test_the_settings_and_the_tokenizer_next_to_it_are_not_read(base: Path, tmp_path: Path) -> None:
    ollama.write(exportable(base), tmp_path / "out", evidence(), Options(type="F32"))
    assert "PARAMETER temperature" not in (tmp_path / "out" / "Modelfile").read_text("utf-8")


def test_its_adapter_is_merged(base: Path) -> None:
    """Other programs would load the adapter on the folder."""
    adapted = replace(exportable(base), kind="adapter")
    plain, reason = plain_or_reason(adapted, Options(), "vLLM", lambda plain: "")
    assert plain is None
    assert "only adapters of a text model that is a folder of safetensors" in reason
