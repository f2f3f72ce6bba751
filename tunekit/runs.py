"""`tunekit runs`: a line for each run below a folder; `clean` removes their checkpoints."""

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tunekit.artifacts.report.values import damage_named, run_values, state_of
from tunekit.artifacts.run import RunFolder, is_finished
from tunekit.console import Console
from tunekit.errors import InputError, TunekitError
from tunekit.files.durable import json_result
from tunekit.files.lock import is_held
from tunekit.records import bytes_text

DEPTH = 4  # how far below the folder runs are looked for


@dataclass(frozen=True)
class RunLine:
    """What is told of one run."""

    path: str
    state: str
    steps: int
    planned_steps: int | None
    loss: float | None  # of the last step
    eval_loss: float | None  # of the exported weights; of the last evaluation while the run continues
    bytes: int
    checkpoint_bytes: int
    age_seconds: float  # since its last record


def runs_verb(folder: str, json_file: str | None) -> None:
    """Raises: InputError where there is no such folder."""
    console, write_result = Console(json_file=json_file), json_result(json_file)
    found = []
    for path in (paths := find_runs(Path(folder))):
        try:
            with damage_named(path):
                found.append(run_line(path))
        except TunekitError as error:  # the others can be told of
            console.warn(str(error))
    if not paths:
        console.info(f"no runs in {folder}; output.dir of a recipe says where its run goes")
    elif found:
        rows = [_cells(line) for line in found]
        console.table(["run", "state", "steps", "loss", "eval\nloss", "size", "check-\npoints", "age"], rows)
    write_result([asdict(line) for line in found])


def clean_verb(folder: str, yes: bool) -> None:
    """Remove the checkpoints of finished runs, and all but the newest of others, after showing what goes.

    Raises: InputError where nobody can be asked and --yes is not given.
    """
    from tunekit.artifacts.checkpoint import removable, remove_checkpoints

    console = Console()
    going: list[tuple[Path, list[Path], int]] = []  # run, its checkpoints, their bytes
    for path in find_runs(Path(folder)):
        if is_held(path):
            console.info(f"{path}: a process is working there; left as it is")
            continue
        try:
            out = removable(path / "checkpoints", is_finished(path))
        except TunekitError as error:
            console.warn(f"{error}; {path} is left as it is")
            continue
        if out:
            going.append((path, out, sum(map(size_bytes, out))))
    if not going:
        console.info("nothing to remove")
        return
    total = bytes_text(sum(size for _, _, size in going))
    rows = [[path, ", ".join(checkpoint.name for checkpoint in out), bytes_text(size)] for path, out, size in going]
    console.table(["run", "checkpoints that go", "size"], rows)
    console.info("RUN@STEP of these will not be there any more; adapter/ and the reports stay.")
    if not yes and not console.confirm(f"remove {total}?"):
        raise InputError("nothing was removed", "answer yes, or give --yes where nobody can be asked")
    for path, out, _ in going:
        with RunFolder.open_resume(path) as run:
            remove_checkpoints(run, out)
    console.info(f"removed {total}")


def find_runs(folder: Path) -> list[Path]:
    """Every run folder at or below this one, by name. Raises: InputError where it is no folder."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}", "name the folder that your runs are in")
    found = []
    for place, names, files in os.walk(folder):
        path = Path(place)
        if "plan.json" in files and "recipe.yaml" in files:
            found.append(path)
            names.clear()
        elif len(path.relative_to(folder).parts) >= DEPTH:
            names.clear()
        names[:] = sorted(name for name in names if not name.startswith("."))
    return found


def run_line(path: Path) -> RunLine:
    """What the files of one run say."""
    values = run_values(path)
    metrics = path / "metrics.jsonl"
    newest = metrics if metrics.exists() else path / "plan.json"
    return RunLine(
        path=str(path),
        state=state_of(values),
        steps=values.steps[-1].count("step") if values.steps else 0,
        planned_steps=values.plan.count("steps") or None,
        loss=values.steps[-1].number("loss") if values.steps else None,
        eval_loss=values.exported.numbers("eval").get("loss") if values.exported_step else None,
        bytes=size_bytes(path),
        checkpoint_bytes=size_bytes(path / "checkpoints"),
        age_seconds=max(0.0, time.time() - newest.stat().st_mtime),
    )


def size_bytes(path: Path) -> int:
    """Of all files below; one that a run removes meanwhile counts nothing."""
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
    """The largest unit: 3 days, 5 h, 12 min, 40 s."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size * (2 if unit == "days" else 1):
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
