"""A file that a command writes must not replace one that the recipe reads."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from tunekit.data.reading.folder import TABLES
from tunekit.errors import InputError
from tunekit.recipe.load import LoadedRecipe
from tunekit.recipe.reading.draft import dotted
from tunekit.recipe.reading.paths import named_paths


def refuse_to_replace(option: str, name: str | None, loaded: LoadedRecipe) -> None:
    """Raises: InputError where the file of an option is the recipe, or one that it names."""
    refuse_to_replace_named(option, name, loaded.recipe.model_dump(mode="json"), loaded.path)


def refuse_to_replace_named(option: str, name: str | None, values: Mapping[str, object], file: Path) -> None:
    """`refuse_to_replace` for some sections of a recipe, as plain values, and the recipe file."""
    if name is None or name == "-":
        return
    if _same(Path(name), file):
        raise InputError(f"{option} {name} is the recipe, which it would replace", "name a new file")
    used = next((key for key, path in _used_files(values) if _same(Path(name), path)), None)
    if used is not None:
        raise InputError(f"{option} {name} is {used} of the recipe, which it would replace", "name a new file")


def _used_files(values: Mapping[str, object]) -> Iterator[tuple[str, Path]]:
    """Every file that the values name, with its key, and the tables of folders that are sources."""
    for path in named_paths(values):
        yield dotted(path.key), path.file
        if path.key[0] == "data":
            yield from ((dotted(path.key), path.file / table) for table in TABLES)


def _same(target: Path, other: Path) -> bool:
    """Whether both names are of one file, also through links."""
    return target.resolve() == other.resolve() or (target.exists() and other.exists() and target.samefile(other))
