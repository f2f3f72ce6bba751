"""Checks that a command does not overwrite a file that the recipe reads."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from tunekit.data.reading.folder import TABLES
from tunekit.data.reading.several import includes
from tunekit.errors import DataError, InputError
from tunekit.recipe.load import LoadedRecipe
from tunekit.recipe.reading.draft import dotted
from tunekit.recipe.reading.paths import named_paths


def refuse_to_replace(option: str, name: str | None, loaded: LoadedRecipe) -> None:
    """Raises: InputError if an option would overwrite the recipe, or a file that the recipe names. `name`: the option's
    file.
    """
    refuse_to_replace_named(option, name, loaded.recipe.model_dump(mode="json"), loaded.path)


def refuse_to_replace_named(option: str, name: str | None, values: Mapping[str, object], file: Path) -> None:
    """Does the check of `refuse_to_replace` for a recipe as plain values. `values`: the recipe's sections. `file`: the
    recipe's file.
    """
    if name is None or name == "-":
        return
    if _same(Path(name), file):
        raise InputError(f"{option} {name} would replace the recipe", "name a new file")
    used = next((key for key, path in _used_files(values) if _same(Path(name), path)), None)
    if used is not None:
        raise InputError(f"{option} {name} would replace {used} of the recipe", "name a new file")
    for path in named_paths(values):
        if path.mark.expected == "rows" and _is_included(path.text, Path(name)):
            verb = "replace" if Path(name).exists() else "become"
            what = f"{option} {name} would {verb} one of the files of {dotted(path.key)}: {path.text}"
            raise InputError(what, "choose a name or a folder that is not part of it")


def _is_included(path: str, file: Path) -> bool:
    """Whether a source of several files includes this file. A source that cannot be read includes nothing."""
    with suppress(DataError, OSError):
        return includes(path, file)
    return False


def _used_files(values: Mapping[str, object]) -> Iterator[tuple[str, Path]]:
    """All files that the values name, with their keys. For a folder as a source, its possible tables are included."""
    for path in named_paths(values):
        yield dotted(path.key), path.file
        if path.key[0] == "data":
            yield from ((dotted(path.key), path.file / table) for table in TABLES)


def _same(target: Path, other: Path) -> bool:
    """Whether both paths lead to the same file, also through links."""
    return target.resolve() == other.resolve() or (target.exists() and other.exists() and target.samefile(other))
