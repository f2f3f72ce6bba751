"""`--to ctranslate2`: what it cannot convert, and its own log-probabilities of text and speech models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.programs import needs
from tests.support.train_case import write_recipe
from tunekit.errors import InputError
from tunekit.export import CERTIFICATE, export_verb
from tunekit.exports import ctranslate2 as module
from tunekit.exports import whole_model
from tunekit.exports.format import Options
from tunekit.exports.programs.program import Program


def test_the_program_is_needed(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_model, "find_program", lambda name: None)
    with pytest.raises(InputError, match=r"is not installed; install it with: python -m .* ctranslate2"):
        export_verb(str(tiny_llama), "ctranslate2", str(tmp_path / "out"))


def test_unknown_types(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both problems at once: the type of the weights, and a model that the converter does not know."""
    monkeypatch.setattr(whole_model, "find_program", lambda name: Program(name, "1", Path()))
    monkeypatch.setattr(module, "MODEL_TYPES", "whisper")
    with pytest.raises(InputError) as error:
        export_verb(str(tiny_llama), "ctranslate2", str(tmp_path / "out"), options=Options(type="Q4_K_M"))
    texts = [str(problem) for problem in error.value.problems]
    assert any("does not read models of type llama" in text for text in texts)
    assert any("--type: Q4_K_M is unknown; choose float32" in text for text in texts)


def test_a_base_that_the_recipe_quantizes(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, model={"quantization": "nf4"})
    with pytest.raises(InputError, match=r"loads the base as nf4, .*; add model\.quantization=none to the command"):
        export_verb(str(recipe), "ctranslate2", str(tmp_path / "out"))


class TestProgram:
    pytestmark = needs("ctranslate2")

    @pytest.mark.parametrize("target", ["tiny_llama", "tuned_run", "tiny_whisper", "speech_run"])
    def test_certificate(self, target: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        path = tmp_path / "out"
        export_verb(str(request.getfixturevalue(target)), "ctranslate2", str(path), certify=True)
        part = json.loads((path / CERTIFICATE).read_text())["certificate"]["parts"]["float32"]
        assert part["largest"] < 1e-3
        assert part["greedy_differences"] == 0
        assert (path / "tokenizer.json").is_file()

    def test_int8_differs_by_its_rounding(self, tuned_run: Path, tmp_path: Path) -> None:
        path = tmp_path / "out"
        export_verb(str(tuned_run), "ctranslate2", str(path), options=Options(type="int8"), certify=True)
        part = json.loads((path / CERTIFICATE).read_text())["certificate"]["parts"]["int8"]
        assert 1e-3 < part["largest"] < 1
