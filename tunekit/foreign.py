"""`tunekit import`: a configuration of Axolotl, LLaMA-Factory or TRL goes in; a recipe and what became of each key come
out. Imports no torch.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tunekit.errors import RecipeError
from tunekit.recipe.load import dump_recipe, load_recipe


def import_verb(path: str, output: str | None) -> None:
    """Write the recipe, to standard output where no file is named; nothing is overwritten.

    Raises: RecipeError where something has no exact translation; what was rewritten is said all the same.
    """
    loaded = load_recipe(path)
    text = dump_recipe(loaded.recipe, Path(output or path).absolute().parent, written_only=True)
    for line in (*loaded.rewrites, *loaded.defaults):
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
