"""`tunekit validate`: the recipe alone, nothing loaded: every problem at once, or the rewrites and a word of assent.

Comes in: a recipe and overrides.  Goes out: lines on stdout.  Imports no torch, and takes less than half a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunekit.artifacts.run import refuse_old_run
from tunekit.errors import RecipeError
from tunekit.recipe.load import LoadedRecipe, load_recipe
from tunekit.recipe.supported import refuse_unsupported


def validate_verb(recipe_path: str, overrides: Sequence[str]) -> None:
    """Check a recipe and say so. Raises RecipeError with every problem."""
    loaded = validate(recipe_path, overrides)
    for line in (*loaded.rewrites, *loaded.defaults):
        print(line)
    print(f"{recipe_path}: valid")


def check_new_run(recipe_path: str, overrides: Sequence[str]) -> None:
    """What train asks before it loads anything. Raises: RecipeError; RunFolderError where a run is in the way."""
    refuse_old_run(Path(load_recipe(recipe_path, overrides).recipe.output.dir))


def validate(recipe_path: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """The recipe, if it is valid and everything in it can be obeyed. Raises RecipeError."""
    loaded = load_recipe(recipe_path, overrides)
    refusals = [loaded.locate(problem) for problem in refuse_unsupported(loaded.recipe)]
    if refusals:
        raise RecipeError.of(refusals)
    return loaded
