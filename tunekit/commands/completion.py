"""What a shell is offered for the arguments of a command, in the form that typer asks for.

Comes in: the beginning of a word and what stands before it.  Goes out: completions.  Where there are none, the shell
offers files.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import typer

Completer = Callable[..., Any]


def recipe_file(incomplete: str) -> Any:
    """Recipe files and folders."""
    return _offers().complete_recipe_file(incomplete)


def shipped_name(incomplete: str) -> Any:
    """Names of shipped recipes."""
    return _offers().complete_shipped_name(incomplete)


def among(*names: str) -> Completer:
    """One of these."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


def named(key: str) -> Completer:
    """One of the names that a key of a recipe may have."""

    def complete(incomplete: str) -> Any:
        return _offers().complete_name(key, incomplete)

    return complete


def override(*sections: str) -> Completer:
    """KEY=VALUE, of these sections only where some are named.

    Bash hands `training.seed=1` over as three words, and wants the last one alone.
    """

    def complete(context: typer.Context, incomplete: str) -> Any:
        words = [str(word) for word in context.params.get("overrides") or ()]
        words += ["="] if _current_word_of_bash() == "=" else []  # which click leaves out
        split = words[-1:] == ["="]
        *given, begun = "\n".join([*words, incomplete]).replace("\n=\n", "=").split("\n")
        found = _offers().complete_override(begun, context.params.get("recipe"), given)
        fitting = [pair for pair in found if not sections or pair[0].removeprefix("~").startswith(sections)]
        return [(text.partition("=")[2] if split else text, meaning) for text, meaning in fitting]

    return complete


def _current_word_of_bash() -> str:
    """The word under the cursor as bash gave it; nothing in another shell."""
    words, number = os.environ.get("COMP_WORDS", "").split("\n"), os.environ.get("COMP_CWORD", "")
    return words[int(number)] if number.isdecimal() and int(number) < len(words) else ""


def _offers() -> Any:
    """Imported only where a shell asks."""
    return import_module("tunekit.commands.offers")
