"""The log-probabilities that a program computes for rows of tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tunekit.contracts import Array
from tunekit.exports.programs.program import Program, run_script
from tunekit.records import JsonObject

IdRows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class NextTokens:
    """Log-probabilities of the next token, in nats, after each of T tokens of a row.

    Shapes: `tokens` (T, K): the ids of the K most probable tokens, the most probable first; `values` (T, K): their
    log-probabilities. If the program gives all V: `values` (T, V) in the vocabulary's order, and `tokens` is None.
    `following` (T - 1,): the log-probabilities of the tokens that follow in the row.
    """

    values: Array
    tokens: Array | None
    following: Array


def ask_script(
    program: Program,
    script: str,
    model: Path,
    rows: IdRows,
    adapter: Path | None = None,
    *,
    options: JsonObject | None = None,
    arrays: Mapping[str, Array] | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[NextTokens]:
    """Run a script of inside/ on a model, with an adapter if there is one, and return the answer for each row.
    `options` and `arrays` are added to the request.

    The script returns `values.N` for row N. If it gives only the K largest values, it returns `tokens.N` and
    `following.N` too.
    Raises: InputError with the last lines of the program's log if it fails.
    """
    request = {"model": str(model), "adapter": None if adapter is None else str(adapter), "rows": [*map(list, rows)]}
    request |= options or {}
    values = run_script(program, script, request, arrays=arrays, environment=environment)
    return [
        NextTokens(values[f"values.{index}"], values[f"tokens.{index}"], values[f"following.{index}"])
        if f"tokens.{index}" in values
        else full_answer(values[f"values.{index}"], row)
        for index, row in enumerate(rows)
    ]


def ask_speech(
    program: Program,
    script: str,
    model: Path,
    rows: IdRows,
    prompts: IdRows,
    features: Sequence[Array],
) -> list[NextTokens]:
    """Run a script of inside/ on recordings, and return the answer for each row. `features`: log-mel features (bands,
    frames) of each recording.

    `prompts`: the ids before each row. Raises: InputError with the last lines of the program's log if it fails.
    """
    arrays = {f"features.{index}": values for index, values in enumerate(features)}
    options: JsonObject = {"prompts": [*map(list, prompts)]}
    return ask_script(program, script, model, rows, options=options, arrays=arrays)


def full_answer(values: Array, row: Sequence[int]) -> NextTokens:
    """The answer for one row of a program that gives all V log-probabilities: `values` (T, V)."""
    return NextTokens(values, None, values[np.arange(len(row) - 1), list(row[1:])])
