"""`tunekit launch`: writes the file that starts a training run on several processes: by torchrun, or on a cluster."""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tunekit.errors import InputError, Problem, RecipeError
from tunekit.files.durable import write_new_text
from tunekit.planning.launch.job import LaunchJob, load_engine
from tunekit.recipe.bases.paths import relative_to
from tunekit.recipe.load import LoadedRecipe, read_draft
from tunekit.recipe.reading.draft import COMMAND_LINE, dotted
from tunekit.recipe.reading.paths import named_paths


def launch_verb(
    loaded: LoadedRecipe,
    recipe: str,
    overrides: Sequence[str],
    on: str,
    nodes: int = 1,
    processes: int = 1,
    output: str | None = None,
) -> None:
    """Write the launch file of a recipe, and print how to submit it. `processes`: the number on each node.

    Raises: InputError for an unknown engine, or if a different file exists already; RecipeError for a recipe that does
    not suit these processes, or this engine.
    """
    engine = load_engine(on)
    if problems := [*_problems(loaded, recipe, nodes, processes)]:
        raise RecipeError.of([loaded.locate(problem) for problem in problems])
    for text in (recipe, *overrides, str(Path.cwd())):
        if not text.isprintable():
            what = f"{text!r} contains a line break or another control character"
            raise InputError(what, "remove it; a launch file cannot contain it")
    named = named_paths(loaded.recipe.model_dump(mode="json"))
    paths = {Path(os.path.abspath(loaded.path)), *(path.file for path in named if path.file.is_absolute())}
    inside = Path(os.path.abspath(recipe)).is_relative_to(Path.cwd())
    job = LaunchJob(
        Path(relative_to(recipe) if inside else recipe),
        tuple(overrides),
        Path.cwd(),
        nodes,
        processes,
        os.environ.get("TUNEKIT_DEVICE") == "cpu",
        tuple(sorted(paths)),
        tuple(map(loaded.locate, _problems_of_a_copy(recipe, overrides, inside))),
        sys.executable,
    )
    path = Path(f"{job.name}{engine.ENDING}" if output is None else output)
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent} for {path.name}", "make it, or name another file")
    if not write_new_text(path, engine.text(job)):
        if path.is_dir():
            raise InputError(f"--output {path} is a folder", "name a new file")
        what = f"{path} exists already with different content"
        raise InputError(what, "remove it, or name another file with --output")
    print("\n".join([f"wrote {path}", *engine.submit(job, shlex.quote(str(path)))]))


def _problems(loaded: LoadedRecipe, recipe: str, nodes: int, processes: int) -> Iterator[Problem]:
    """Problems of a recipe that a launch file cannot start, or that was written for another number of ranks."""
    if loaded.sweep is not None and loaded.sweep.has_trials:
        how = f"run `tunekit sweep {shlex.quote(recipe)}`, or add ~sweep to train the recipe's own values"
        yield Problem("a launch file trains one run, and a sweep computes in one process", how, key="sweep")
    budget, speeds, ranks = loaded.recipe.memory.budget, loaded.recipe.training.rank_speeds, nodes * processes
    lists = {"memory.budget": budget if isinstance(budget, tuple) else None, "training.rank_speeds": speeds}
    for key, values in lists.items():
        if values is not None and len(values) != ranks:
            what = f"the list has {len(values)} values, but --nodes {nodes} and --gpus {processes} make {ranks} ranks"
            yield Problem(what, "write one value for each rank, or change these options", key=key)


def _problems_of_a_copy(recipe: str, overrides: Sequence[str], inside: bool) -> Iterator[Problem]:
    """Problems of a job that runs in a copy of the working folder, in another place: paths that it would not find.
    `inside`: whether the recipe is in the working folder."""
    folder = Path.cwd()
    if not inside:
        what = f"the nodes get a copy of {folder}, which does not contain this recipe"
        yield Problem(what, "start `tunekit launch` in a folder that contains the recipe and its data")
    draft, _ = read_draft(recipe, overrides)
    for path in named_paths(draft.values):
        if path.file.is_absolute() and path.file.is_relative_to(folder):
            here = folder if draft.place(path.key).file == COMMAND_LINE else Path(recipe).parent
            what = f"the nodes have a copy of {folder} in another place, without the path {path.text}"
            yield Problem(what, f"write {relative_to(path.text, here)}", key=dotted(path.key))
