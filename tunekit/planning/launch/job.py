"""The job that a launch file describes, and the engines by name: one file of this folder each."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from tunekit.errors import InputError, Problem
from tunekit.recipe.reading.suggest import did_you_mean

ENGINES = ("torchrun", "slurm", "skypilot", "kubernetes", "ray")  # in the order of their use
PORT = 29500  # torchrun's default
WAIT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # the variable with which torchrun waits for the checkpoint after SIGTERM
WAIT_SECONDS = 600  # torchrun's default is 30


@dataclass(frozen=True)
class LaunchJob:
    """A training run on several processes. `recipe` and `overrides`: as on the command line, in the working folder
    `folder`. `processes`: the number on each node; each uses one GPU, or none with `on_cpu`. `paths`: the local paths
    that the recipe names, made absolute. `problems_of_a_copy`: problems if the nodes have a copy of the working folder
    in another place. `python`: the interpreter on nodes that share this machine's folders."""

    recipe: Path
    overrides: tuple[str, ...]
    folder: Path
    nodes: int
    processes: int
    on_cpu: bool
    paths: tuple[Path, ...]
    problems_of_a_copy: tuple[Problem, ...]
    python: str

    @cached_property
    def name(self) -> str:
        """A name of the job that all engines accept: a letter, then lower-case letters, digits and hyphens; at most 50
        characters."""
        name = re.sub("[^a-z0-9]+", "-", self.recipe.stem.lower()).strip("-") or "run"
        return (name if name[0].isalpha() else f"run-{name}")[:50].strip("-")

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The arguments of tunekit. `--resume` starts the run if there is no checkpoint."""
        device = ("--device", "cpu") if self.on_cpu else ()
        return ("train", str(self.recipe), *self.overrides, "--resume", *device)

    @cached_property
    def command(self) -> str:
        """The module and its arguments, quoted for a shell."""
        return shlex.join(("-m", "tunekit", *self.words))

    @cached_property
    def cd(self) -> str:
        """The line of a shell script that enters the working folder."""
        return f"cd {shlex.quote(str(self.folder))} || exit"

    @cached_property
    def outside(self) -> str:
        """The paths of the recipe that are not in the working folder, as a list for a message; empty if there are
        none."""
        return ", ".join(shlex.quote(str(path)) for path in self.paths if not path.is_relative_to(self.folder))

    def shared(self, *, with_python: bool = False) -> list[str]:
        """A line for the user about the paths that all nodes must see; nothing for a single node. `with_python`: the
        file names this machine's interpreter."""
        names = [shlex.quote(str(self.folder)), self.outside]
        if with_python and not Path(self.python).is_relative_to(self.folder):
            names.append(f"{shlex.quote(self.python)} and its packages")
        places = ", ".join(filter(None, names))
        return [f"all nodes must see these paths, with the same content: {places}"] if self.nodes > 1 else []

    def copied(self) -> list[str]:
        """A line for the user about the paths that a copy of the working folder does not contain; nothing if there are
        none."""
        return [f"the nodes see {self.folder} only; put these into it: {self.outside}"] if self.outside else []


class Launcher(Protocol):
    """A file of this folder: what starts the processes of a run."""

    ENDING: str  # of the file's name

    def text(self, job: LaunchJob) -> str:
        """The content of the launch file. Raises: RecipeError if the job would fail on the nodes."""
        ...

    def submit(self, job: LaunchJob, path: str) -> Sequence[str]:
        """Lines for the user: how to submit the file. `path`: the file, quoted for a shell."""
        ...


def load_engine(name: str) -> Launcher:
    """Raises: InputError for an unknown name."""
    if name not in ENGINES:
        raise InputError(f"--on {name}: unknown engine", did_you_mean(name, ENGINES, "known engines"))
    return cast(Launcher, import_module(f"tunekit.planning.launch.{name}"))
