"""Finds the folder of the shipped recipes, their data and their schema. This folder is in the installed package, or
next to the package in a clone."""

from pathlib import Path

from tunekit.errors import InputError

RUNS = "runs"  # run folders of a clone's recipes; their recipe.yaml files are not shipped

SCHEMA_NAME = "recipe.schema.json"  # the first line of each recipe names it
SCHEMA_MARK = "# yaml-language-server: $schema="  # editors with that server look for it
SCHEMA_LINE = SCHEMA_MARK + SCHEMA_NAME


def shipped_folder() -> Path:
    """The folder of shipped recipes: `tunekit/shipped_recipes` in a wheel, else `recipes` in the clone.

    Raises: InputError if neither exists.
    """
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "shipped_recipes", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise InputError(f"the folder of the shipped recipes is missing in {package}", "install tunekit again")


def shipped_recipes() -> dict[str, Path]:
    """The files of all shipped recipes by name, sorted. A name is "sft-lora", or "folder/name" in a subfolder."""
    folder = shipped_folder()
    files = {file.relative_to(folder): file for file in sorted(folder.rglob("*.yaml"))}
    return {name.with_suffix("").as_posix(): file for name, file in files.items() if name.parts[0] != RUNS}


def first_comment(recipe: Path) -> str:
    """The recipe's description: the comment in its first line, or after the line that names the schema; empty if there
    is none."""
    with recipe.open(encoding="utf-8") as opened:
        lines = (line.strip() for line in opened)
        line = next((line for line in lines if not line.startswith(SCHEMA_MARK)), "")
    return line.removeprefix("#").strip() if line.startswith("#") else ""
