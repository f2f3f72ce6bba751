"""`tunekit recipes`: lists the recipes that come with tunekit, prints one, or copies one with its data."""

import shutil
from pathlib import Path

from tunekit.console import Console
from tunekit.errors import RecipeError
from tunekit.files.durable import write_new_text
from tunekit.recipe.load import load_recipe
from tunekit.recipe.reading.paths import named_paths
from tunekit.recipe.reading.schema import schema_text
from tunekit.recipe.reading.shipped import SCHEMA_NAME, first_comment, shipped_recipes
from tunekit.recipe.reading.suggest import did_you_mean

ENDINGS = (".yaml", ".yml")


def recipes_verb(name: str | None, copy_to: str | None) -> None:
    """List recipes, print a recipe, or copy a recipe. Raises: RecipeError for an unknown name, or if a different file
    is already at the copy's path."""
    known = shipped_recipes()
    if name is None:
        if copy_to is not None:
            raise RecipeError("--copy needs the name of a recipe", f"known recipes: {', '.join(known)}")
        groups: dict[str, list[tuple[str, str]]] = {}
        for each, file in known.items():
            groups.setdefault(load_recipe(file).recipe.objective.method, []).append((each, first_comment(file)))
        for objective, pairs in groups.items():
            Console().listing(f"objective: {objective}", pairs, max(map(len, known)))
        return
    if name not in known:
        raise RecipeError(f"unknown recipe '{name}'", did_you_mean(name, known, "known recipes"))
    if copy_to is None:
        print(known[name].read_text(encoding="utf-8"), end="")
        return
    for file in copy_recipe(known[name], Path(copy_to)):
        print(f"wrote {file}")


def copy_recipe(recipe: Path, target: Path) -> list[Path]:
    """Copy a shipped recipe, and the files that it names in its own folder, to the same relative paths. Returns the
    written paths.

    The schema for editors is written into the same folder. No existing file is overwritten.
    """
    target = target if target.suffix in ENDINGS else target / recipe.name
    loaded = load_recipe(recipe).recipe
    named = [path.file for path in named_paths(loaded.model_dump(mode="json")) if path.mark.expected]
    pairs = {target: recipe}
    for path in named:
        if path.is_relative_to(recipe.parent):
            files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
            pairs |= {target.parent / each.relative_to(recipe.parent): each for each in files if each.is_file()}
    for copy, original in pairs.items():
        if copy.exists() and (not copy.is_file() or copy.read_bytes() != original.read_bytes()):
            raise RecipeError("exists already with different content", "name another folder", file=str(copy))
    for copy, original in pairs.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(original, copy)
    schema = target.parent / SCHEMA_NAME
    return [*pairs, *([schema] if write_new_text(schema, schema_text()) else [])]
