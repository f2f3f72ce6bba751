"""Completions of arguments, for typer. If there are no completions, the shell offers files.

offers.py reads recipes, so it is imported only when a shell requests completions.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

Completer = Callable[..., Any]
ENDINGS = (".yaml", ".yml")


def complete_recipe_file(incomplete: str) -> list[str]:
    """Recipe files and folders. If only one folder matches, also its content."""
    folder, slash, name = incomplete.rpartition("/")
    try:
        entries = sorted(Path(folder + slash or ".").iterdir())
    except OSError:
        return []
    fitting = [
        f"{folder}{slash}{entry.name}{'/' if entry.is_dir() else ''}"
        for entry in entries
        if entry.name.startswith(name) and (name or not entry.name.startswith("."))
        if entry.is_dir() or entry.suffix in ENDINGS
    ]
    inside = complete_recipe_file(fitting[0]) if len(fitting) == 1 and fitting[0].endswith("/") else []
    return inside or fitting


def shipped_name(incomplete: str) -> list[tuple[str, str]]:
    """Names of shipped recipes."""
    from tunekit.commands.offers import complete_shipped_name

    return complete_shipped_name(incomplete)


def among(*names: str) -> Completer:
    """A completer for a fixed list of names."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


def named(key: str) -> Completer:
    """A completer for the values of a recipe's key."""

    def complete(incomplete: str) -> list[str]:
        from tunekit.commands.offers import complete_name

        return complete_name(key, incomplete)

    return complete


def override(*sections: str) -> Completer:
    """A completer for KEY=VALUE with keys of these sections; without sections, with all keys.

    Bash passes `training.seed=1` as three words, and expects a completion of the last word only.
    """

    def complete(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
        from tunekit.commands.offers import complete_override

        words = [str(word) for word in context.params.get("overrides") or ()]
        words += ["="] if _current_word_of_bash() == "=" else []  # click drops it
        split = words[-1:] == ["="]
        *earlier, prefix = "\n".join([*words, incomplete]).replace("\n=\n", "=").split("\n")
        completions = complete_override(prefix, context.params.get("recipe"), earlier)
        fitting = [pair for pair in completions if not sections or pair[0].removeprefix("~").startswith(sections)]
        return [(text.partition("=")[2] if split else text, meaning) for text, meaning in fitting]

    return complete


def _current_word_of_bash() -> str:
    """The word at the cursor in bash; empty in other shells."""
    words, number = os.environ.get("COMP_WORDS", "").split("\n"), os.environ.get("COMP_CWORD", "")
    return words[int(number)] if number.isdecimal() and int(number) < len(words) else ""
