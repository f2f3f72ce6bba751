"""Runs llama.cpp on a GGUF file, with or without a GGUF adapter."""

from collections.abc import Sequence
from pathlib import Path

from tunekit.exports.programs.answer import IdRows, NextTokens, ask_script
from tunekit.exports.programs.program import Program, run_script

NAME = "llama.cpp"


def answers(program: Program, model: Path, rows: IdRows, adapter: Path | None = None) -> list[NextTokens]:
    """All log-probabilities, with a float32 cache. Raises: InputError with the log if llama.cpp cannot read the
    file."""
    return ask_script(program, "llama_cpp", model, rows, adapter)


def tokens_of(program: Program, model: Path, texts: Sequence[str]) -> list[list[int]]:
    """llama.cpp's token ids of texts, with the tokens that it adds around a text."""
    values = run_script(program, "llama_cpp_tokens", {"model": str(model), "texts": list(texts)})
    return [values[f"tokens.{index}"].tolist() for index in range(len(texts))]
