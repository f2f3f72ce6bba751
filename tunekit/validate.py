"""`tunekit validate`: checks a recipe and the files that it names, and prints all problems at once. It does not import
torch, so it takes less than half a second."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from tunekit.console import Console
from tunekit.data.reading.data_file import inspect_file
from tunekit.data.reading.first import open_rows
from tunekit.data.reading.folder import is_folder, is_saved, with_table
from tunekit.data.reading.problems import Problems
from tunekit.data.reading.replaced import refuse_to_replace, refuse_to_replace_named
from tunekit.data.reading.several import files_of
from tunekit.errors import DataError, Problem, RecipeError
from tunekit.files.durable import json_result
from tunekit.recipe.load import LoadedRecipe, load_recipe
from tunekit.recipe.reading.draft import dotted
from tunekit.recipe.reading.paths import named_paths
from tunekit.recipe.reading.supported import refuse_unsupported
from tunekit.recipe.reading.trial_recipes import LoadedSweep, load_sweep
from tunekit.recipe.recipe import Recipe

CHECKED = (
    "checked: keys, values, the existence of local files, and the first row of JSONL, CSV and text files; not checked: "
    "the other rows and the model (`tunekit plan` checks both)"
)
READ_BY_LINE = ("jsonl", "csv", "text")  # kinds of files whose first row is fast to read
CONFIG = "adapter_config.json"


def _may_be_model(path: Path) -> bool:
    """Whether the path can be a model: a hub name, a file, or a folder with a JSON file."""
    return not path.is_absolute() or path.is_file() or any(path.glob("*.json"))


# expected content of a path -> check, problem, what to do; rows are checked separately
ABSENCE: dict[str, tuple[Callable[[Path], bool], str, str]] = {
    "file": (Path.is_file, "no such file", "check the path"),
    "code": (Path.is_file, "no such file", "check the path: FILE.py:NAME"),
    "folder": (Path.is_dir, "no such folder", "check the path"),
    "adapter": (lambda path: (path / CONFIG).is_file(), f"contains no adapter ({CONFIG})", "check the path"),
    "model": (_may_be_model, "contains no model", "check the path, or write a hub name"),
}


def validate_verb(recipe_path: str, overrides: Sequence[str], json_file: str | None) -> None:
    """Check a recipe and print the result. Raises: RecipeError with all problems; InputError if --json names the
    recipe."""
    refuse_to_replace_named("--json", json_file, {}, Path(recipe_path))
    write_result = json_result(json_file)
    try:
        loaded = validate(recipe_path, overrides)
    except RecipeError as error:
        if json_file is not None and not _may_be_replaced(
            json_file
        ):  # an invalid recipe cannot show whether this is a data file
            what = f"--json {json_file} exists and is not a result of tunekit validate"
            raise RecipeError.of([*error.problems, Problem(what, "name a new file")], error.notes) from None
        problems = [asdict(problem) for problem in error.problems]
        write_result({"valid": False, "problems": problems, "notes": list(error.notes)})
        raise
    refuse_to_replace("--json", json_file, loaded)
    notes = [*loaded.rewrites, *loaded.defaults]
    write_result({"valid": True, "problems": [], "notes": notes})
    if json_file != "-":
        Console().result(*notes, f"{recipe_path}: valid", CHECKED)


def _may_be_replaced(name: str) -> bool:
    """Whether --json may write to this path: the file does not exist, or contains an earlier result."""
    if name == "-" or not Path(name).is_file():
        return True
    try:
        earlier = json.loads(Path(name).read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(earlier, dict) and "valid" in earlier


def validate(recipe_path: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """The checked recipe; all trials of its sweep are checked too. Raises: RecipeError if the recipe or a trial is
    invalid or unsupported, or names a file that does not exist."""
    loaded = load_recipe(recipe_path, overrides)
    _refuse([loaded])
    if loaded.sweep is not None and loaded.sweep.has_trials:
        validate_sweep(recipe_path, overrides)
    return loaded


def validate_sweep(recipe_path: str, overrides: Sequence[str] = ()) -> LoadedSweep:
    """The trials of a recipe. Raises: RecipeError with the problems of all trials."""
    sweep = load_sweep(recipe_path, overrides)
    divided = sweep.section.folds is not None  # the files of the folds are written later; the settings' files exist
    _refuse(
        [setting.loaded for setting in sweep.settings.values()] if divided else [trial.loaded for trial in sweep.trials]
    )
    return sweep


def _refuse(recipes: Sequence[LoadedRecipe]) -> None:
    """Refuse unsupported recipes, and recipes that name a missing file. Raises: RecipeError with all problems."""
    refusals = [
        loaded.locate(problem)
        for loaded in recipes
        for problem in (*refuse_unsupported(loaded.recipe), *_missing_files(loaded.recipe))
    ]
    if refusals:
        raise RecipeError.of(refusals, recipes[0].rewrites)


def _read_by_line(path: str) -> bool:
    """Whether the first row of a source can be read fast. Raises: DataError if the path is not a source of rows."""
    files = files_of(path)
    if not files and (is_folder(path) or is_saved(path)):
        return is_folder(path)
    return inspect_file((files or (Path(path),))[0]).kind in READ_BY_LINE


def _missing_files(recipe: Recipe) -> Iterator[Problem]:
    """Problems with local files that are missing or have the wrong kind. (In a loaded recipe, local paths are
    absolute.)"""
    for path in named_paths(recipe.model_dump(mode="json")):
        if path.mark.expected in ABSENCE and (path.mark.endings is None or path.file.is_absolute()):
            is_there, what, how = ABSENCE[path.mark.expected]
            if not is_there(path.file):
                yield Problem(f"{path.file}: {what}", how, key=dotted(path.key))
    for name, sources in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        for index, source in enumerate(sources if isinstance(sources, tuple) else ()):
            if Path(source.path).is_absolute():
                try:
                    if _read_by_line(with_table(source).path):
                        # with max_rows, all rows would be read for the random draw
                        first = source.model_copy(update={"max_rows": None})
                        open_rows(first, recipe.objective.example, Problems())
                except DataError as error:
                    problem = error.problems[0]
                    file = problem.file or source.path
                    place = file if problem.line is None else f"{file}:{problem.line}"
                    yield Problem(f"{place}: {problem.what}", problem.how, key=f"data.{name}.{index}.path")
