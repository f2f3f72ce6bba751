"""Runs whisper.cpp on a Whisper model in a GGML file."""

from collections.abc import Sequence
from pathlib import Path

from tunekit.contracts import Array
from tunekit.exports.programs.answer import IdRows, NextTokens, ask_speech
from tunekit.exports.programs.program import Program

NAME = "whisper.cpp"


def answers(
    program: Program, model: Path, rows: IdRows, prompts: IdRows, features: Sequence[Array]
) -> list[NextTokens]:
    """All log-probabilities of a file for recordings, each as log-mel features (bands, frames).

    Raises: InputError with whisper.cpp's log if it does not read the file.
    """
    return ask_speech(program, "whisper_cpp", model, rows, prompts, features)
