"""`tunekit launch`: writes the file that starts a training run on several processes: by torchrun, or on a cluster."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tunekit.errors import InputError
from tunekit.files.durable import write_new_text
from tunekit.planning.launch.job import LaunchJob, load_engine
from tunekit.recipe.load import LoadedRecipe
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

    Raises: InputError for an unknown engine, or if a different file exists already.
    """
    engine = load_engine(on)
    for text in (recipe, *overrides, str(Path.cwd())):
        if not text.isprintable():
            what = f"{text!r} contains a line break or another control character"
            raise InputError(what, "remove it; a launch file cannot contain it")
    named = named_paths(loaded.recipe.model_dump(mode="json"))
    paths = {loaded.path.absolute(), *(path.file for path in named if path.file.is_absolute())}
    job = LaunchJob(
        Path(recipe),
        tuple(overrides),
        Path.cwd(),
        nodes,
        processes,
        os.environ.get("TUNEKIT_DEVICE") == "cpu",
        tuple(sorted(paths)),
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
