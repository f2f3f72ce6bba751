"""llama.cpp reads a GGUF file, with or without a GGUF adapter."""

from pathlib import Path

from tunekit.exports.programs.answer import IdRows, NextTokens, ask_script
from tunekit.exports.programs.program import Program

NAME = "llama.cpp"


def answers(program: Program, model: Path, rows: IdRows, adapter: Path | None = None) -> list[NextTokens]:
    """All log-probabilities, with a float32 cache. Raises: InputError with the log if it reads no such file."""
    return ask_script(program, "llama_cpp", model, rows, adapter)
