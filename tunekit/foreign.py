"""`tunekit import` makes a recipe of another tool's configuration, and prints what became of each key."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunekit.console import visible
from tunekit.errors import RecipeError, TunekitError
from tunekit.recipe.foreign.tools import PEFT
from tunekit.recipe.load import dump_recipe, load_recipe
from tunekit.recipe.reading.dump import yaml_lines
from tunekit.recipe.reading.yaml_reader import read_recipe_file

ROWS, RUN = "train.jsonl", "runs/imported"  # what an adapter's configuration cannot say


def import_verb(path: str, output: str | None) -> None:
    """Write the recipe, to standard output where no file is named; nothing is overwritten.

    Raises: RecipeError where something has no exact translation; what was rewritten is said all the same.
    """
    if Path(path).suffix == ".json" and "peft_type" in read_recipe_file(Path(path)).values:
        text, said = _of_adapter(Path(path))
    else:
        text, said = _of_recipe(path, output)
    for line in said:
        print(visible(line), file=sys.stderr)
    if output is None:
        print(text, end="")
        return
    try:
        with Path(output).open("x", encoding="utf-8") as opened:
            opened.write(f"# from {Path(path).name}\n{text}")
    except FileExistsError:
        raise RecipeError("exists already", "name another file", file=output) from None
    print(f"wrote {output}; check it with: tunekit validate {output}")


def _of_recipe(path: str, output: str | None) -> tuple[str, list[str]]:
    """The recipe's text, and a line for each key."""
    try:
        loaded = load_recipe(path, imported=True)
    except RecipeError as error:
        titles = ["lost, or to be settled:"] if any(problem.key for problem in error.problems) else []
        raise RecipeError.of(error.problems, [*_by_kind(error.notes), *titles]) from error
    text = dump_recipe(loaded.recipe, Path(output or path).absolute().parent, written_only=True)
    changed = {line.partition(": ")[0] for line in loaded.rewrites}
    kept = [f"{path}:{line}: {key}" for key, line in loaded.lines.items() if f"{path}:{line}" not in changed]
    whose = [f"{path}: a configuration of {loaded.tool}"] if loaded.tool else []
    return text, [*whose, *_by_kind(loaded.rewrites), *_titled("kept:", kept), *loaded.defaults]


def _of_adapter(path: Path) -> tuple[str, list[str]]:
    """The recipe that makes such an adapter: the base and the method are PEFT's, the rows and the run are to be named.

    Raises: RecipeError naming each field that has no translation.
    """
    from tunekit.adapters.folder.config import method_of
    from tunekit.files.untrusted import parse_json, read_small

    fields = parse_json(read_small(path), str(path))
    try:
        method = method_of(fields, str(path))
        settings = method.peft.read(fields, str(path))
    except TunekitError as error:
        raise RecipeError.of(error.problems, [f"{path}: a configuration of {PEFT}", "lost:"]) from error
    own = {name: setting for name, (setting, _) in method.peft.fields.items()}
    written = settings.model_dump(mode="json", exclude_defaults=True)
    adapter = {"method": settings.method, **{name: value for name, value in written.items() if name != "method"}}
    base = {"name_or_path": fields.get("base_model_name_or_path") or "BASE"}
    if fields.get("revision"):
        base["revision"] = fields["revision"]
    values: dict[str, Any] = {"model": base, "data": {"train": ROWS}, "adapter": adapter, "output": {"dir": RUN}}
    told = ("peft_type", *method.peft.claims)  # what says which method it is
    from_base = {"base_model_name_or_path": "model", "revision": "model", **dict.fromkeys(told, "adapter.method")}
    kept = [f"{path}: {name} -> adapter.{own[name]}" for name in fields if name in own]
    kept += [f"{path}: {name} -> {to}" for name, to in from_base.items() if name in fields]
    others = [f"{path}: {name} -> nothing" for name in fields if name not in own and name not in from_base]
    asked = f"to be named: data.train (here {ROWS}) and output.dir: an adapter's configuration knows neither"
    said = [f"{path}: a configuration of {PEFT}", *_titled("kept:", kept), *_titled("without effect here:", others)]
    return "\n".join(yaml_lines(values)) + "\n", [*said, asked]


def _by_kind(rewrites: Sequence[str]) -> list[str]:
    """What was rewritten, what has no effect here, and what is the tool's default, each under its title."""
    without = [line for line in rewrites if " -> nothing" in line]
    defaults = [line for line in rewrites if ": default of " in line]
    changed = [line for line in rewrites if line not in without and line not in defaults]
    written = _titled("not written there, and written out here:", defaults)
    return [*_titled("changed:", changed), *_titled("without effect here:", without), *written]


def _titled(title: str, lines: Sequence[str]) -> list[str]:
    return [title, *(f"  {line}" for line in lines)] if lines else []
