"""Where the shipped recipes, their data and their schema lie: inside an installed package, or beside it in a clone."""

from pathlib import Path

from tunekit.errors import InputError

RUNS = "runs"  # where the recipes of a clone leave their run folders, each with a recipe.yaml of its own

SCHEMA_NAME = "recipe.schema.json"  # beside the recipes whose first line names it
SCHEMA_MARK = "# yaml-language-server: $schema="  # which editors with that server look for
SCHEMA_LINE = SCHEMA_MARK + SCHEMA_NAME


def shipped_folder() -> Path:
    """The folder of shipped recipes: `tunekit/shipped_recipes` of a wheel, else `recipes` of the clone.

    Raises: InputError where neither exists.
    """
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "shipped_recipes", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise InputError(f"the shipped recipes are missing beside {package}", "install tunekit again")


def shipped_recipes() -> dict[str, Path]:
    """Every shipped recipe by name, sorted: "sft-lora", or "folder/name" in a folder below."""
    folder = shipped_folder()
    files = {file.relative_to(folder): file for file in sorted(folder.rglob("*.yaml"))}
    return {name.with_suffix("").as_posix(): file for name, file in files.items() if name.parts[0] != RUNS}


def first_comment(recipe: Path) -> str:
    """What a recipe says of itself: its first line, or the one below the schema's, if that is a comment."""
    with recipe.open(encoding="utf-8") as opened:
        lines = (line.strip() for line in opened)
        line = next((line for line in lines if not line.startswith(SCHEMA_MARK)), "")
    return line.removeprefix("#").strip() if line.startswith("#") else ""
