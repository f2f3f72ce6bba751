"""Paths in a recipe are relative to the recipe file, those of the command line to the working folder: made absolute on
reading, relative to the new file on writing.

Comes in: a Draft and the recipe's folder.  Goes out: absolute paths in place; hub names stay as they are.
A leading `~` is the home folder; `$VAR` is not expanded.
"""

from __future__ import annotations

import os
from pathlib import Path

from tunekit.recipe.reading.draft import COMMAND_LINE, Draft, KeyPath

LONGEST_NAME_BYTES = 255
LONGEST_PATH_BYTES = 4096
ALWAYS_LOCAL = (("output", "dir"), ("data", "chat_template"), ("adapter", "init_from"), ("objective", "class_data_dir"))
REWARD_PATHS = ("function", "model")  # of a reward: FILE.py:NAME is a path too
MODELS = (("model", "name_or_path"), ("objective", "teacher", "name_or_path"))
_DATA_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".zst", ".arrow")
_MODEL_ENDINGS = (".gguf",)


def resolve_paths(draft: Draft, folder: Path) -> None:
    """Make every local path of the draft absolute, in place; a path that no system can hold is a problem."""
    for key in ALWAYS_LOCAL:
        _resolve(draft, key, folder, endings=None)
    for model in MODELS:
        _resolve(draft, model, folder, endings=_MODEL_ENDINGS)
    for name in ("train", "eval"):
        sources = draft.get(("data", name))
        for index in range(len(sources) if isinstance(sources, list) else 0):
            _resolve(draft, ("data", name, index, "path"), folder, endings=_DATA_ENDINGS)
    rewards = draft.get(("objective", "reward"))
    for index in range(len(rewards) if isinstance(rewards, list) else 0):
        for name in REWARD_PATHS:
            _resolve(draft, ("objective", "reward", index, name), folder, endings=None)


def relative_path(path: str, folder: Path) -> str:
    """An absolute path as written in a recipe inside `folder`; anything else (a hub name) unchanged."""
    if not os.path.isabs(path):
        return path
    relative = os.path.relpath(path, folder)
    return relative if relative.startswith("..") else f"./{relative}"


def _resolve(draft: Draft, key: KeyPath, folder: Path, *, endings: tuple[str, ...] | None) -> None:
    """One path; `endings` None means that it can be nothing but a local path."""
    text = draft.get(key)
    if not isinstance(text, str) or not text:
        return
    fault = _fault(text)
    if fault:
        draft.add_problem(key, fault, "write a shorter path" if "long" in fault else "")
        return
    folder = Path.cwd() if draft.place(key).file == COMMAND_LINE else folder
    absolute = os.path.normpath(folder / os.path.expanduser(text))
    local = endings is None or text in (".", "..") or text.startswith(("./", "../", "/", "~"))
    if local or text.lower().endswith(endings or ()) or os.path.lexists(absolute):
        draft.get(key[:-1])[key[-1]] = absolute


def _fault(text: str) -> str | None:
    """Why no file can have this name."""
    if "\0" in text:
        return "a path cannot hold NUL"
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        return "holds characters that no file name can have"
    if len(encoded) > LONGEST_PATH_BYTES or any(len(part) > LONGEST_NAME_BYTES for part in encoded.split(b"/")):
        return "is too long for a file name"
    return None
