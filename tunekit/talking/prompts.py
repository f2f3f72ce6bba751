"""Reads the prompts of `tunekit generate` from a file, a folder or standard input."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tunekit.adapters.folder.config import adapter_in
from tunekit.data.reading.folder import is_media
from tunekit.data.reading.problems import Problems
from tunekit.data.reading.source import read_source
from tunekit.errors import DataError
from tunekit.formats.label_pairs import names_pair, read_pair
from tunekit.recipe.data import Source
from tunekit.talking.embedder import SIDES

TextOrPair = str | tuple[str, str]  # a text, or a pair of texts
TABLES = (".csv", ".tsv", ".json", ".parquet")  # endings of files of prompts with columns, besides .jsonl
PROMPT_LINE = (
    'write {"prompt": "..."}, or for a pair {"sentence1": "...", "sentence2": "..."}, or for embeddings '
    '{"query": "..."} or {"document": "..."}'
)


@dataclass(frozen=True)
class PromptRow:
    """A prompt, and the folder of the adapter that answers it. None: the target's own adapter answers. `side`: whether
    the text is a query or a document, if its row states it; only embedding models read it."""

    prompt: TextOrPair
    adapter: Path | None = None
    side: str | None = None


def read_prompts(path: Path) -> list[PromptRow]:
    """The prompts in a file; `-` is standard input.

    - A .jsonl file has one object per line, with `prompt`, `text`, the two texts of a pair, `query` or `document`. A
      .csv, .tsv, .json or .parquet file has such columns. `adapter` names the folder of an adapter or run, relative to
      the file.
    - A recording or an image is one prompt. A folder of them has one prompt per file.
    - In any other file, each line is a prompt.

    Raises: DataError with the line.
    """
    if path.is_dir():
        if media := [name for name in sorted(os.listdir(path)) if is_media(name)]:
            return [PromptRow(name) for name in media]
        how = "tunekit reads only files directly in this folder, not in folders inside it"
        raise DataError("it contains no recording and no image", how, file=str(path))
    if str(path) != "-" and not path.exists():
        raise DataError("there is no such file or folder", "check the path of --prompts", file=str(path))
    if is_media(path.name):
        return [PromptRow(path.name)]
    if path.suffix.lower() in TABLES:
        problems = Problems()
        prompts = [_row_of(row.values, path, row.line) for row in read_source(Source(path=str(path)), problems)]
        problems.raise_if_any()
    else:
        prompts = _prompts_in_lines(path)
    if not prompts:
        file = "standard input" if str(path) == "-" else str(path)
        raise DataError("it contains no prompt", "write one prompt per line, or use --prompt TEXT", file=file)
    return prompts


def _prompts_in_lines(path: Path) -> list[PromptRow]:
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        lines = data.decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", "use a UTF-8 text file", file=str(path)) from error
    numbered = [(number, line.rstrip("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    return [_prompt_of(line, path, number) for number, line in numbered]


def _prompt_of(line: str, path: Path, number: int) -> PromptRow:
    if path.suffix != ".jsonl":
        return PromptRow(line)
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON ({error})", PROMPT_LINE, file=str(path), line=number) from error
    return _row_of(value if isinstance(value, dict) else {}, path, number)


def _row_of(row: Mapping[str, Any], path: Path, number: int) -> PromptRow:
    """The prompt in a row and its adapter. Raises: DataError if the row has no such prompt, or its adapter does not
    exist."""
    name, similar = row.get("adapter"), get_close_matches("adapter", row, cutoff=0.85)
    if "adapter" not in row and similar:
        raise DataError(
            f"'{similar[0]}' is not read; did you mean 'adapter'?", "rename it", file=str(path), line=number
        )
    adapter = adapter_in(Path(os.path.abspath(path.parent / name))) if isinstance(name, str) and name else None
    if name not in (None, "") and adapter is None:
        how = "name the folder of an adapter or a run; a relative path starts at the folder of this file"
        raise DataError(f"'adapter': {name!r} contains no adapter", how, file=str(path), line=number)
    sides = [side for side in SIDES if isinstance(row.get(side), str)]
    if len(sides) == 1 and not row.keys() & {"prompt", "text"}:
        return PromptRow(str(row[sides[0]]), adapter, sides[0])
    return PromptRow(_prompt_in(row, path, number), adapter)


def _prompt_in(row: Mapping[str, Any], path: Path, number: int) -> TextOrPair:
    """The prompt in a row. Raises: DataError if it has none."""
    if isinstance(row.get("prompt"), str):
        return str(row["prompt"])
    if names_pair(row):
        try:
            return read_pair(row)
        except DataError as error:
            raise DataError(error.problems[0].what, PROMPT_LINE, file=str(path), line=number) from None
    if isinstance(row.get("text"), str):
        return str(row["text"])
    raise DataError("has no text under 'prompt' or 'text'", PROMPT_LINE, file=str(path), line=number)
