"""Runs optimum, which converts a model folder to ONNX, and ONNX Runtime on the result."""

from pathlib import Path

from tunekit.exports.programs.answer import IdRows, NextTokens, ask_script
from tunekit.exports.programs.program import CONVERSION_SECONDS, Program, run_script

NAME = "onnx"


def convert(program: Program, folder: Path, output: Path) -> None:
    """Write model.onnx, which has a key-value cache, and the tokenizer's files to `output`.

    Raises: InputError with optimum's log if the conversion fails.
    """
    request = {"model": str(folder), "output": str(output)}
    run_script(program, NAME, request, seconds=CONVERSION_SECONDS)


def answers(program: Program, model: Path, rows: IdRows) -> list[NextTokens]:
    """All log-probabilities of a converted folder. Raises: InputError with the log if ONNX Runtime cannot read it."""
    return ask_script(program, NAME, model, rows)
