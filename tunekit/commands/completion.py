"""Completions of a command's arguments, in the form that typer asks for; where there are none, the shell offers files.

offers.py, which reads recipes, is imported only when a shell asks.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

Completer = Callable[..., Any]
ENDINGS = (".yaml", ".yml")


def complete_recipe_file(incomplete: str) -> list[str]:
    """Recipe files and folders; where one folder alone fits, what is in it."""
    folder, slash, name = incomplete.rpartition("/")
    try:
        there = sorted(Path(folder + slash or ".").iterdir())
    except OSError:
        return []
    fitting = [
        f"{folder}{slash}{entry.name}{'/' if entry.is_dir() else ''}"
        for entry in there
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
    """One of these."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


def named(key: str) -> Completer:
    """One of the names that a key of a recipe may have."""

    def complete(incomplete: str) -> list[str]:
        from tunekit.commands.offers import complete_name

        return complete_name(key, incomplete)

    return complete


def override(*sections: str) -> Completer:
    """KEY=VALUE, of these sections only where some are named.

    Bash hands `training.seed=1` over as three words, and wants the last one alone.
    """

    def complete(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
        from tunekit.commands.offers import complete_override

        words = [str(word) for word in context.params.get("overrides") or ()]
        words += ["="] if _current_word_of_bash() == "=" else []  # which click leaves out
        split = words[-1:] == ["="]
        *given, begun = "\n".join([*words, incomplete]).replace("\n=\n", "=").split("\n")
        found = complete_override(begun, context.params.get("recipe"), given)
        fitting = [pair for pair in found if not sections or pair[0].removeprefix("~").startswith(sections)]
        return [(text.partition("=")[2] if split else text, meaning) for text, meaning in fitting]

    return complete


def _current_word_of_bash() -> str:
    """The word under the cursor as bash gave it; nothing in another shell."""
    words, number = os.environ.get("COMP_WORDS", "").split("\n"), os.environ.get("COMP_CWORD", "")
    return words[int(number)] if number.isdecimal() and int(number) < len(words) else ""
