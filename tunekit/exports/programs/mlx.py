"""Runs MLX on a model folder, with or without an adapter in mlx-lm's layout."""

from pathlib import Path

from tunekit.exports.programs.answer import IdRows, NextTokens, ask_script
from tunekit.exports.programs.program import Program

NAME = "mlx"


def answers(program: Program, model: Path, rows: IdRows, adapter: Path | None = None) -> list[NextTokens]:
    """All log-probabilities, computed in float32. Raises: InputError with the log if MLX cannot read the folder."""
    return ask_script(program, "mlx", model, rows, adapter)
