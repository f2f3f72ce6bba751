"""Runs CTranslate2: conversion of a model folder, and log-probabilities of the result."""

from collections.abc import Sequence
from pathlib import Path

from tunekit.contracts import Array
from tunekit.exports.programs.answer import IdRows, NextTokens, ask_script, ask_speech
from tunekit.exports.programs.program import CONVERSION_SECONDS, Program, run_script
from tunekit.records import JsonObject

NAME = "ctranslate2"


def convert(
    program: Program, folder: Path, output: Path, quantization: str, copied: list[str], left_out: JsonObject
) -> None:
    """Write a model folder in CTranslate2's layout. `copied`: the names of files to copy. `quantization`: float32, int8
    ... `left_out`: settings that the converter leaves out, and that the script adds.

    Raises: InputError with the converter's log if the conversion fails.
    """
    request = {"model": str(folder), "output": str(output), "type": quantization, "files": copied, **left_out}
    run_script(program, NAME, request, seconds=CONVERSION_SECONDS)


def answers(program: Program, model: Path, rows: IdRows) -> list[NextTokens]:
    """All log-probabilities of a converted language model. Raises: InputError with the log if CTranslate2 cannot
    read it."""
    return ask_script(program, NAME, model, rows)


def speech_answers(
    program: Program, model: Path, rows: IdRows, prompts: IdRows, features: Sequence[Array]
) -> list[NextTokens]:
    """All log-probabilities of a converted Whisper for recordings, each as log-mel features (bands, frames)."""
    return ask_speech(program, "ctranslate2_speech", model, rows, prompts, features)
