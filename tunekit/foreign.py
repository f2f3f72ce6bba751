"""`tunekit import`: a configuration of Axolotl, LLaMA-Factory or TRL goes in; a recipe and what became of each key come
out. Imports no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tunekit.errors import RecipeError
from tunekit.recipe.load import dump_recipe, load_recipe


def import_verb(path: str, output: str | None) -> None:
    """Write the recipe, to standard output where no file is named; nothing is overwritten.

    Raises: RecipeError where something has no exact translation; what was rewritten is said all the same.
    """
    try:
        loaded = load_recipe(path)
    except RecipeError as error:
        raise RecipeError.of(error.problems, [*_by_kind(error.notes), "lost, or to be settled:"]) from error
    text = dump_recipe(loaded.recipe, Path(output or path).absolute().parent, written_only=True)
    changed = {line.partition(": ")[0] for line in loaded.rewrites}
    kept = [f"{path}:{line}: {key}" for key, line in loaded.lines.items() if f"{path}:{line}" not in changed]
    for line in (*_by_kind(loaded.rewrites), *_titled("kept:", kept), *loaded.defaults):
        print(line, file=sys.stderr)
    if output is None:
        print(text, end="")
        return
    try:
        with Path(output).open("x", encoding="utf-8") as opened:
            opened.write(f"# from {Path(path).name}\n{text}")
    except FileExistsError:
        raise RecipeError("exists already", "name another file", file=output) from None
    print(f"wrote {output}; check it with: tunekit validate {output}")


def _by_kind(rewrites: Sequence[str]) -> list[str]:
    """What was rewritten, then what has no effect here, each under its title."""
    without = [line for line in rewrites if " -> nothing" in line]
    changed = [line for line in rewrites if line not in without]
    return [*_titled("changed:", changed), *_titled("without effect here:", without)]


def _titled(title: str, lines: Sequence[str]) -> list[str]:
    return [title, *(f"  {line}" for line in lines)] if lines else []
