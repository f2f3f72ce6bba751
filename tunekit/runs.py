"""`tunekit runs`: lists the runs below a folder. `tunekit runs clean` removes their checkpoints."""

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tunekit.artifacts.report.values import damage_named, run_values
from tunekit.artifacts.run import RunFolder, is_finished
from tunekit.console import Console
from tunekit.errors import InputError, TunekitError
from tunekit.files.durable import json_result
from tunekit.files.lock import is_held
from tunekit.records import bytes_text

DEPTH = 4  # maximum depth of runs below the folder


@dataclass(frozen=True)
class RunLine:
    """The listed values of one run."""

    path: str
    state: str
    steps: int
    planned_steps: int | None
    loss: float | None  # of the last step
    eval_loss: float | None  # of the exported weights; while the run continues, of the last evaluation
    bytes: int
    checkpoint_bytes: int
    age_seconds: float  # seconds since its last record


def runs_verb(folder: str, json_file: str | None) -> None:
    """List runs. Raises: InputError if there is no such folder."""
    console, write_result = Console(json_file=json_file), json_result(json_file)
    lines = []
    for path in (paths := find_runs(Path(folder))):
        try:
            with damage_named(path):
                lines.append(run_line(path))
        except TunekitError as error:  # the other runs can still be listed
            console.warn(str(error))
    if not paths:
        console.info(f"no runs in {folder}; a recipe's output.dir is its run folder")
    elif lines:
        rows = [_cells(line) for line in lines]
        console.table(["run", "state", "steps", "loss", "eval\nloss", "size", "check-\npoints", "age"], rows)
    write_result([asdict(line) for line in lines])


def clean_verb(folder: str, yes: bool) -> None:
    """Remove the checkpoints of finished runs, and all but the newest checkpoint of other runs, after confirmation.

    Raises: InputError if there is nobody to ask and no --yes.
    """
    from tunekit.artifacts.checkpoint import removable, remove_checkpoints

    console = Console()
    removals: list[tuple[Path, list[Path], int]] = []  # run, its checkpoints, their bytes
    for path in find_runs(Path(folder)):
        if is_held(path):
            console.info(f"{path}: a process is using it; left unchanged")
            continue
        try:
            checkpoints = removable(path / "checkpoints", is_finished(path))
        except TunekitError as error:
            console.warn(f"{error}; {path} is left unchanged")
            continue
        if checkpoints:
            removals.append((path, checkpoints, sum(map(size_bytes, checkpoints))))
    if not removals:
        console.info("nothing to remove")
        return
    total = bytes_text(sum(size for _, _, size in removals))
    rows = [
        [path, ", ".join(checkpoint.name for checkpoint in checkpoints), bytes_text(size)]
        for path, checkpoints, size in removals
    ]
    console.table(["run", "removed checkpoints", "size"], rows)
    console.info("Commands can then no longer use RUN@STEP for these checkpoints; adapter/ and the reports stay.")
    if not yes and not console.confirm(f"remove {total}?"):
        raise InputError("nothing was removed", "answer yes, or add --yes if no user can answer")
    for path, checkpoints, _ in removals:
        with RunFolder.open_resume(path) as run:
            remove_checkpoints(run, checkpoints)
    console.info(f"removed {total}")


def find_runs(folder: Path) -> list[Path]:
    """All run folders at or below `folder`, sorted by name. Raises: InputError if it is not a folder."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}", "name the folder that your runs are in")
    runs = []
    for place, names, files in os.walk(folder):
        path = Path(place)
        if "plan.json" in files and "recipe.yaml" in files:
            runs.append(path)
            names.clear()
        elif len(path.relative_to(folder).parts) >= DEPTH:
            names.clear()
        names[:] = sorted(name for name in names if not name.startswith("."))
    return runs


def run_line(path: Path) -> RunLine:
    """One line about a run, made from the run's files."""
    values = run_values(path)
    metrics = path / "metrics.jsonl"
    newest = metrics if metrics.exists() else path / "plan.json"
    return RunLine(
        path=str(path),
        state=values.state,
        steps=values.steps[-1].count("step") if values.steps else 0,
        planned_steps=values.plan.count("steps") or None,
        loss=values.steps[-1].number("loss") if values.steps else None,
        eval_loss=values.exported.numbers("eval").get("loss") if values.exported_step else None,
        bytes=size_bytes(path),
        checkpoint_bytes=size_bytes(path / "checkpoints"),
        age_seconds=max(0.0, time.time() - newest.stat().st_mtime),
    )


def size_bytes(path: Path) -> int:
    """The total bytes of all files below the path. A file that a run removes in the meantime counts 0."""
    size = 0
    for place, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size += os.lstat(os.path.join(place, name)).st_size
    return size


def _cells(line: RunLine) -> Sequence[object]:
    steps = f"{line.steps:,}" + ("" if line.planned_steps is None else f"/{line.planned_steps:,}")
    loss, eval_loss = (("–" if value is None else f"{value:.4g}") for value in (line.loss, line.eval_loss))
    size, checkpoints = bytes_text(line.bytes), bytes_text(line.checkpoint_bytes)
    return [line.path, line.state, steps, loss, eval_loss, size, checkpoints, age_text(line.age_seconds)]


def age_text(seconds: float) -> str:
    """An age in its largest unit, such as 3 days, 5 h, 12 min or 40 s."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size * (2 if unit == "days" else 1):
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
