"""Runs transformers 4 on a model folder."""

from pathlib import Path

from tunekit.exports.programs.answer import IdRows, NextTokens, ask_script
from tunekit.exports.programs.program import Program

NAME = "transformers4"


def answers(program: Program, model: Path, rows: IdRows) -> list[NextTokens]:
    """All log-probabilities, computed in float32. Raises: InputError with the log if transformers 4 cannot read the
    folder."""
    return ask_script(program, NAME, model, rows)
