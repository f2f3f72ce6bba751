"""Checkpoints: the complete state that an exact resume needs. They are written atomically, and verified before use.

checkpoints/step-000100/ contains tensors.safetensors, state.json and manifest.json.
"""

import contextlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tunekit.artifacts.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    OUR_NAMES,
    STATE,
    TENSORS,
    DamagedError,
    checkpoint_name,
    has_sizes,
    is_ours,
    read_manifest,
    verify,
)
from tunekit.artifacts.run import RunFolder, read_json
from tunekit.contracts import Tensors
from tunekit.errors import RunFolderError, TunekitError
from tunekit.files import durable
from tunekit.files.tensors import iterate_tensors, read_tensor_header, write_tensors
from tunekit.files.untrusted import RUN_FILE
from tunekit.records import JsonObject

STEP_NAME = re.compile(r"step-(\d{6,})")
HALF_DONE_NAME = re.compile(r"\.(tmp|deleting)-step-\d{6,}-\d+(-\d+)?")
REPLACED_NAME = re.compile(r"\.replaced-(step-\d{6,})-\d+(-\d+)?")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. `tensors`: CPU tensors by name; `facts`: all other values of the state."""

    step: int
    tensors: Tensors
    facts: JsonObject
    path: Path


def save_checkpoint(
    run: RunFolder,
    step: int,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, object],
    *,
    keep: int,
    protect: Collection[int] = (),
) -> Path:
    """Write the state after `step`, then delete old checkpoints except the `keep` newest and the steps in `protect`.

    Order: write a temporary folder, flush its files, write the manifest last, rename, flush the parent, then rotate.
    Raises: ResourceError if the disk is full; older checkpoints do not change.
    """
    folder, parent = run.checkpoints / checkpoint_name(step), run.checkpoints
    if not durable.is_real_folder(parent):
        durable.make_folder(parent)
        durable.sync(run.path)
    run.sync_metrics()
    temporary = parent / f".tmp-{checkpoint_name(step)}-{os.getpid()}"
    _remove_temporary(temporary)
    try:
        durable.make_folder(temporary)
        _write_files(temporary, step, tensors, facts)
        _put_in_place(run, temporary, folder)
    except BaseException:
        with contextlib.suppress(OSError, TunekitError):
            _remove_temporary(temporary)
        raise
    rotate(run, step, keep=keep, protect=protect)
    return folder


def _write_files(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> None:
    """Write and flush the tensors, the state and finally the manifest. So if the manifest exists, the other files are
    complete."""
    size, digest = write_tensors(folder / TENSORS, tensors)
    files = {TENSORS: {"bytes": size, "sha256": digest}}
    with durable.DurableFile(folder / STATE) as file:
        file.write(durable.json_bytes({"step": step, "facts": dict(facts)}))
    files[STATE] = {"bytes": file.size_bytes, "sha256": file.sha256}
    with durable.DurableFile(folder / MANIFEST) as file:
        file.write(durable.json_bytes({"format": FORMAT, "version": FORMAT_VERSION, "step": step, "files": files}))
    durable.sync(folder)


def _put_in_place(run: RunFolder, temporary: Path, folder: Path) -> None:
    """Rename the temporary folder to its final name. If this step already has a checkpoint, it is moved aside first,
    and moved back if the renaming fails."""
    if not os.path.lexists(folder):
        durable.rename(temporary, folder)
        return
    if not is_ours(folder):
        aside = _free_name(folder.with_name(f"damaged-{folder.name}"))
        run.warn(f"{folder} is not a complete checkpoint; it is renamed to {aside.name}")
        durable.rename(folder, aside)
        durable.rename(temporary, folder)
        return
    replaced = _free_name(folder.with_name(f".replaced-{folder.name}-{os.getpid()}"))
    durable.rename(folder, replaced)
    try:
        durable.rename(temporary, folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.rename(replaced, folder)
        raise
    _delete(run, replaced, folder.name)


def _free_name(path: Path) -> Path:
    """`path`, or the first of path-2, path-3 ... that does not exist."""
    candidate, number = path, 1
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def _remove_temporary(folder: Path) -> None:
    """Remove a temporary folder, if tunekit wrote all of its files."""
    if durable.is_real_folder(folder) and {entry.name for entry in folder.iterdir()} <= OUR_NAMES:
        durable.remove_tree(folder)


def tidy_checkpoints(run: RunFolder) -> None:
    """Repair the folder after a run was killed: remove half-written and half-deleted checkpoints. A checkpoint that was
    moved aside gets its name back."""
    if not durable.is_real_folder(run.checkpoints):
        return
    for entry in sorted(run.checkpoints.iterdir()):
        replaced = REPLACED_NAME.fullmatch(entry.name)
        if replaced and durable.is_real_folder(entry) and not os.path.lexists(run.checkpoints / replaced[1]):
            durable.rename(entry, run.checkpoints / replaced[1])
        elif replaced or HALF_DONE_NAME.fullmatch(entry.name):
            _remove_temporary(entry)


# --- finding them --------------------------------------------------------------------------------------------------


def list_checkpoints(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every entry whose name is that of a checkpoint, newest first. The checkpoints are not
    verified."""
    if not durable.is_real_folder(checkpoints):
        return []
    found = [(int(match[1]), entry) for entry in checkpoints.iterdir() if (match := STEP_NAME.fullmatch(entry.name))]
    return sorted(found, reverse=True)


def find_checkpoint(name: str) -> Path | None:
    """The checkpoint folder for a name: RUN@120, RUN@best, RUN@last or the path of a checkpoint. None for other names.

    Raises: RunFolderError if the run has no such checkpoint.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path.resolve() if (path / MANIFEST).exists() and STEP_NAME.fullmatch(path.resolve().name) else None
    start, sign, which = name.rpartition("@")
    run = Path(start).expanduser()
    if not sign or not run.is_dir():
        return None
    steps = dict(list_checkpoints(run.resolve() / "checkpoints"))  # newest first
    step = int(which) if which.isdecimal() else next(iter(steps), -1)
    if which == "best" and steps:
        step = _exported_best(run) or load_checkpoint(steps[step]).facts["loop"]["best_step"]
    if step in steps and (which.isdecimal() or which in ("best", "last")):
        return steps[step]
    if not steps:
        raise RunFolderError(f"{start} has no checkpoint yet", "wait until the step of training.save_steps")
    why = "set evaluation.best to save the best one" if which == "best" else "older ones are removed during a run"
    there = f"its checkpoints are {', '.join(map(str, sorted(steps)))} ({why}); write {start}@STEP or {start}@last"
    raise RunFolderError(f"{start} has no checkpoint '{which}'", there)


def _exported_best(run: Path) -> int | None:
    """The best step in the report of a run that has ended. At its end by time, a run saves its last checkpoint before
    its last evaluation."""
    status, report = (read_json(run / f"{name}.json") or {} for name in ("status", "report"))
    return report.get("best_step") if status.get("exit_code") == 0 else None


# --- reading back --------------------------------------------------------------------------------------------------


def load_checkpoint(folder: Path) -> Checkpoint:
    """Verify one checkpoint and read it.

    Raises: RunFolderError if it is damaged or was written by a newer tunekit.
    """
    try:
        return _load(folder)
    except DamagedError as error:
        raise RunFolderError(f"checkpoint {folder} is damaged: {error}", "restore it from a copy") from error


def _load(folder: Path) -> Checkpoint:
    """Verify one checkpoint and read it. Raises: DamagedError, so that load_newest can try an older one."""
    manifest = read_manifest(folder)
    try:
        verify(folder, manifest)
        state = json.loads((folder / STATE).read_bytes())
        path = folder / TENSORS
        tensors = dict(sorted(iterate_tensors(path, read_tensor_header(path, RUN_FILE), RUN_FILE)))
    except (OSError, ValueError, KeyError, RecursionError, RunFolderError) as error:
        raise DamagedError(f"cannot be read ({error})") from error
    return Checkpoint(manifest["step"], tensors, state["facts"], folder)


def load_newest(run: RunFolder) -> Checkpoint | None:
    """Load the newest complete checkpoint; None if the run has no checkpoint.

    A damaged checkpoint is skipped with a warning. Raises: RunFolderError if all checkpoints are damaged.
    """
    tidy_checkpoints(run)
    damaged = []
    for _, folder in list_checkpoints(run.checkpoints):
        try:
            checkpoint = _load(folder)
        except DamagedError as error:
            damaged.append(f"{folder.name}: {error}")
            continue
        for reason in damaged:
            run.warn(f"checkpoint {reason}; the run continues from {folder.name}")
        return checkpoint
    if damaged:
        what = f"every checkpoint in {run.checkpoints} is damaged ({'; '.join(damaged)})"
        raise RunFolderError(what, "restore a checkpoint, or start again in a different output.dir")
    return None


def removable(checkpoints: Path, finished: bool) -> list[Path]:
    """The checkpoints that can be deleted, newest first. A finished run needs no checkpoints; any other run needs its
    newest complete checkpoint, and the best one so far, which may be exported. Folders that tunekit did not write are
    not included."""
    ours = {folder: step for step, folder in list_checkpoints(checkpoints) if is_ours(folder)}
    newest = newest_complete(checkpoints)
    if finished or newest is None:
        return list(ours) if finished else []
    best = json.loads((newest / STATE).read_bytes())["facts"].get("loop", {}).get("best_step")
    return [folder for folder, step in ours.items() if step < ours[newest] and step != best]


def newest_complete(checkpoints: Path) -> Path | None:
    """The folder of the newest complete checkpoint; None if there is none."""
    return next((folder for _, folder in list_checkpoints(checkpoints) if is_ours(folder) and _is_whole(folder)), None)


def _is_whole(folder: Path) -> bool:
    try:
        verify(folder, read_manifest(folder))
    except (DamagedError, OSError):
        return False
    return True


# --- rotation ------------------------------------------------------------------------------------------------------


def rotate(run: RunFolder, step: int, *, keep: int, protect: Collection[int]) -> None:
    """Delete checkpoints up to `step`, except the `keep` newest and those in `protect`. Folders that tunekit did not
    write are never deleted.

    Checkpoints after `step` are not deleted. They are damaged, so the run skipped them when it resumed; it will write
    these steps again.
    """
    ours = {number: at for number, at in list_checkpoints(run.checkpoints) if number <= step and is_ours(at)}
    newest = [number for number, folder in ours.items() if has_sizes(folder)][: max(keep, 1)]
    for number, folder in ours.items():
        if number not in {step, *newest, *protect}:
            _delete(run, folder, folder.name)


def remove_checkpoints(run: RunFolder, folders: Collection[Path]) -> None:
    """Delete these folders, except those that tunekit did not write."""
    for folder in filter(is_ours, folders):
        _delete(run, folder, folder.name)


def _delete(run: RunFolder, folder: Path, name: str) -> None:
    """Delete a checkpoint. It is renamed first, so that a half-deleted folder never looks like a checkpoint. A failure
    is only a warning, because the new checkpoint is already safe on disk."""
    deleting = _free_name(run.checkpoints / f".deleting-{name}-{os.getpid()}")
    try:
        durable.rename(folder, deleting)
        durable.remove_tree(deleting)
    except (OSError, TunekitError) as error:
        run.warn(f"could not remove the old checkpoint {folder}: {error}")
