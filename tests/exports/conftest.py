"""A run whose adapter changes its base by much, and the same for speech."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import speech_case
from tests.support.train_case import train_in_child, write_recipe
from tunekit.errors import InputError
from tunekit.exports.llama_cpp.converter import converter_folder


@pytest.fixture(scope="session")
def installed() -> None:
    """llama.cpp's converter, which some tests need."""
    try:
        converter_folder()
    except InputError as error:
        pytest.skip(error.problems[0].what)


@pytest.fixture(scope="session")
def tuned_run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A LoRA of a tiny llama."""
    folder = tmp_path_factory.mktemp("tuned")
    sections = {"data": {"eval": 0.3}, "training": {"epochs": 4.0, "learning_rate": 0.1}}
    ended = train_in_child(write_recipe(folder, tiny_llama, **sections), folder / "run")
    assert ended.code == 0, ended.output
    return folder / "run"


@pytest.fixture(scope="session")
def tiny_whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Whisper of the shape that whisper.cpp reads."""
    folder = tmp_path_factory.mktemp("whisper")
    return speech_case.write_tiny_whisper(folder / "base", encoder_ffn_dim=128, decoder_ffn_dim=128)


@pytest.fixture(scope="session")
def speech_run(tmp_path_factory: pytest.TempPathFactory, tiny_whisper: Path) -> Path:
    """A LoRA of the tiny Whisper."""
    folder = tmp_path_factory.mktemp("speech")
    sounds = speech_case.write_sounds(folder / "sounds", speech_case.texts(6))
    recipe = speech_case.write_recipe(folder, tiny_whisper, sounds, training={"learning_rate": 0.05})
    ended = train_in_child(recipe, folder / "run")
    assert ended.code == 0, ended.output
    return folder / "run"
