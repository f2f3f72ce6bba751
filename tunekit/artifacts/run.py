"""The run folder. The run's process checks the folder and locks it before a model is loaded. The folder stays readable
if this process is killed. If there are several ranks, only rank 0 has a run folder."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from tunekit.artifacts import metrics_log
from tunekit.console.text import visible
from tunekit.errors import InputError, ResourceError, RunFolderError, redact
from tunekit.files import durable
from tunekit.files.lock import LOCK_NAME, FolderLock
from tunekit.files.untrusted import RUN_RECORD, read_small
from tunekit.records import EvaluationRecord, StepRecord, bytes_text

ROWS_NAME = "evaluation_rows.json"  # the loss of each evaluation row, with the weights to export
TASKS_NAME = "tasks.json"  # the scores of lm-eval's tasks, with those of the base
EXPORTS = "exports.json"  # the exports of the result, with their certificates
REPORTS = ("report.json", "report.md", "report.html")
RANK_NAME = "rank.html"  # the page of `tunekit data rank`
RECORDS = ("recipe.yaml", "plan.json", "environment.json", "status.json", "metrics.jsonl", ROWS_NAME)
FILES = (*RECORDS, *REPORTS, RANK_NAME)
PICTURES = "pictures"  # images that the model generated at each evaluation
FOLDERS = ("checkpoints", "adapter", "model", "tracking", PICTURES)
RUN_SIGNS = ("plan.json", "checkpoints")
STOPPED_BY_TIME = "stopped_by_time"  # the reason in status.json of a run that training.max_minutes ended
SWEEP_NAME = "sweep.json"
PART = re.compile(r"\.(?P<name>.+)\.part-\d+(?P<old>\.old)?")  # temporary files, and old folders moved aside for them
RESULT_FILES = {  # result folder -> names of its files
    "adapter": re.compile(
        r"adapter_config\.json|(adapter_model|pytorch_lora_weights)\.safetensors|tunekit\.json|chat_template\.jinja"
    ),
    "model": re.compile(r".+\.(safetensors|json|jinja|model|txt|py)|(LICEN[CS]E|USE_POLICY|NOTICE).*"),
}


def print_warning(text: str) -> None:
    """Print a warning to standard error; the default of `warn`."""
    print(visible(redact(text)), file=sys.stderr)


def refuse_to_replace_part(option: str, name: str | None, run: Path) -> None:
    """Raises: InputError if an option names an output file in the run folder that only `train` may write."""
    if name is None or name == "-":
        return
    target, folder = Path(name).resolve(), run.resolve()
    parts = [folder / part for part in (*FILES, *FOLDERS) if part != "report.html"]
    if any(target.is_relative_to(part) for part in parts):
        raise InputError(f"{option} {name} would replace a file of the run", "name a new file")


class RunFolder:
    """A run folder that this process has locked. Use `open_new` or `open_resume` to make one."""

    def __init__(self, path: Path, lock: FolderLock, warn: Callable[[str], None]) -> None:
        self.path = path
        self.warn = warn
        self._lock = lock

    @classmethod
    def open_new(
        cls, path: Path | str, *, overwrite: bool = False, warn: Callable[[str], None] = print_warning
    ) -> RunFolder:
        """Lock a folder for a new run. `overwrite`: move an old run aside first.

        Raises: RunFolderError if the folder contains a run, or if another process has locked it.
        """
        if overwrite:
            _move_aside(Path(os.path.abspath(path)), warn)
        return _open(Path(path), resume=False, warn=warn)

    @classmethod
    def open_resume(cls, path: Path | str, *, warn: Callable[[str], None] = print_warning) -> RunFolder:
        """Lock the folder of a run to resume it. If the folder contains no run, it is opened for a new run."""
        return _open(Path(path), resume=True, warn=warn)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics_path(self) -> Path:
        """The path of metrics.jsonl."""
        return self.path / metrics_log.METRICS_NAME

    def require_free_bytes(self, estimated_bytes: int) -> None:
        """Refuse to start if the disk has less than twice `estimated_bytes` free, because an old checkpoint is deleted
        only after the new one is complete. Raises: ResourceError."""
        free, needed = durable.free_bytes(self.path), 2 * estimated_bytes
        if free < needed:
            what = f"{self.path} has {bytes_text(free)} ({free} bytes) free, but the run needs {bytes_text(needed)}"
            how = "free disk space, choose another output.dir, or lower training.keep_checkpoints"
            raise ResourceError(f"{what} ({needed} bytes) for its checkpoints and results", how)

    def write_text(self, name: str, text: str) -> None:
        """Write one file of the run folder, completely or not at all."""
        durable.write_text(self.path / name, text)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write one file of the run folder, completely or not at all. Its parent folder is created if needed."""
        (self.path / name).parent.mkdir(exist_ok=True)
        durable.write_bytes(self.path / name, data)

    def write_json(self, name: str, value: object) -> None:
        """Write one JSON file of the run folder, completely or not at all."""
        durable.write_json(self.path / name, value)

    def read_json(self, name: str) -> Any | None:
        """The content of a JSON file in the run folder; None if it is absent."""
        return read_json(self.path / name)

    def append_metrics(self, record: StepRecord | EvaluationRecord) -> None:
        """Append one record to metrics.jsonl."""
        metrics_log.append_line(self.metrics_path, metrics_log.record_line(record))

    def truncate_metrics(self, step: int, evaluated_step: int | None = None) -> int:
        """Remove the records after `step`, and evaluations after `evaluated_step`, so that a run can resume there.
        Returns the number of remaining records."""
        return metrics_log.truncate_metrics(self.metrics_path, step, evaluated_step)

    def read_metrics(self) -> list[metrics_log.Record]:
        """All records of metrics.jsonl, including those before a resume."""
        return metrics_log.read_metrics(self.metrics_path)

    def sync_metrics(self) -> None:
        """Flush metrics.jsonl to disk. save_checkpoint calls this first, so that metrics.jsonl is never older than a
        checkpoint."""
        if self.metrics_path.exists():
            durable.sync(self.metrics_path)

    def status(self, exit_code: int | None, reason: str, *, finished: bool = False) -> None:
        """Write status.json. `exit_code`: None while the run continues; 0 after all results are safe on disk.
        `finished`: nothing is left to train."""
        self.write_json("status.json", {"exit_code": exit_code, "reason": redact(reason), "finished": finished})

    def close(self) -> None:
        """Release the lock."""
        self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_json(path: Path) -> Any | None:
    """The content of a JSON file; None if it is absent.

    Raises: RunFolderError if it cannot be read.
    """
    try:
        return json.loads(read_small(path, RUN_RECORD))
    except (RunFolderError, ValueError, RecursionError) as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        what = error.problems[0].what if isinstance(error, RunFolderError) else f"cannot be read: {error}"
        raise RunFolderError(what, "restore it, or start a new run", file=str(path)) from error


def is_finished(path: Path | str) -> bool:
    """Whether nothing is left to train in this folder's run, according to status.json, which is written last. (Older
    versions wrote only the exit code.)"""
    status = read_json(Path(path) / "status.json")
    return isinstance(status, dict) and status.get("finished", status.get("exit_code") == 0) is True


def _move_aside(path: Path, warn: Callable[[str], None]) -> None:
    """Rename the folder of an earlier run to PATH.1, or to the first name of PATH.2, PATH.3 ... that is free. Its files
    are not changed. If the path is a symbolic link, its target is renamed, so that the new run is written where the
    link points to."""
    if not any(os.path.lexists(path / name) for name in RUN_SIGNS):
        return
    linked = path.is_symlink()
    path = path.resolve() if linked else path
    aside = next(each for number in count(1) if not os.path.lexists(each := path.with_name(f"{path.name}.{number}")))
    lock = FolderLock(path)
    if not durable.IS_POSIX:
        lock.release()  # its lock file is in the folder
    try:
        durable.rename(path, aside)
    except OSError as error:
        raise durable.explain(error, "move aside", path) from error
    finally:
        lock.release()
    if linked:
        durable.make_folder(path)
    warn(f"the old run in {path} is now in {aside}")


def _open(path: Path, *, resume: bool, warn: Callable[[str], None]) -> RunFolder:
    """Check, create and lock the folder. Then check it again, test whether it can be written to, and remove leftovers
    of killed runs."""
    path = Path(os.path.abspath(path))
    new_folders: list[Path] = []
    lock = None
    try:
        refuse_old_run(path, resume=resume)
        if holds_sweep(path):
            raise RunFolderError(f"{path} already holds a sweep", "choose another output.dir")
        _make_folders(path, new_folders)
        lock = FolderLock(path)
        refuse_old_run(path, resume=resume, ours=True)
        _probe(path)
        _tidy(path)
    except BaseException as error:
        if lock is not None:
            lock.remove() if new_folders else lock.release()
        for folder in reversed(new_folders):
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise durable.explain(error, "use", path) from error
        raise
    if lock.lost:
        warn(f"{path}: a process{lock.lost} has ended without releasing this folder, which is now used by this run")
    return RunFolder(path, lock, warn)


def holds_sweep(path: Path) -> bool:
    """Whether a sweep uses this folder. A run's files next to its files would be taken for one result."""
    return (path / SWEEP_NAME).exists() and not any((path / sign).exists() for sign in RUN_SIGNS)


def refuse_old_run(path: Path, *, resume: bool = False, ours: bool = False) -> None:
    """Check whether a run can use this folder. `ours`: whether this process has locked the folder.

    Raises: RunFolderError if a run cannot use it.
    """
    if path.is_symlink() and not path.exists():
        raise RunFolderError(f"{path} is a symbolic link to a missing file", "remove or repair the link")
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path} is not a folder", "choose another output.dir")
    if (path / "checkpoints").is_symlink():
        raise RunFolderError(f"{path / 'checkpoints'} is a symbolic link", "make output.dir a symbolic link instead")
    ours = ours or (path / LOCK_NAME).exists()
    if resume and (ours or any(os.path.lexists(path / name) for name in RUN_SIGNS)):
        return
    for name in RUN_SIGNS:
        if os.path.lexists(path / name) and not resume:
            how = "continue it with --resume, move it aside with --overwrite, or choose a different output.dir"
            if (path / LOCK_NAME).exists():
                FolderLock(path).release()  # the message about a running run is better
            raise RunFolderError(f"{path} already holds a run ({name})", how)
    if ours:
        return
    foreign = [name for name in (*FILES, *FOLDERS) if os.path.lexists(path / name)]
    if foreign:
        what = f"{path} contains {', '.join(foreign)}, which a run would overwrite, but no run wrote these files"
        raise RunFolderError(what, "choose another output.dir")


def _make_folders(path: Path, new_folders: list[Path]) -> None:
    """Create the folder and its missing parents. Adds the created folders to `new_folders`, outermost first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        try:
            durable.perform("mkdir", folder, folder.mkdir)
        except FileExistsError:  # another process was quicker
            continue
        except OSError as error:
            raise durable.explain(error, "make", folder) from error
        new_folders.append(folder)
        durable.sync(folder.parent)


def _probe(path: Path) -> None:
    """Write, flush and remove a small file. So a folder without write access causes an error now, not at the first
    save."""
    probe = durable.temporary_name(path / RECORDS[0])
    if durable.is_real_file(probe):
        durable.unlink(probe)
    try:
        with durable.DurableFile(probe) as file:
            file.write(b"tunekit\n")
    finally:
        with contextlib.suppress(OSError):
            os.unlink(probe)
    durable.sync(path)


def _tidy(path: Path) -> None:
    """Remove unfinished files and folders of killed runs. Only files with tunekit's temporary names are removed, and
    only folders whose files tunekit wrote."""
    for entry in sorted(path.iterdir()):
        part = PART.fullmatch(entry.name)
        if part is None:
            continue
        if durable.is_real_file(entry) and part["name"] in FILES and not part["old"]:
            durable.unlink(entry)
        elif durable.is_real_folder(entry) and part["name"] in RESULT_FILES and _holds_only(entry, part["name"]):
            if part["old"] and not os.path.lexists(path / part["name"]):
                durable.rename(entry, path / part["name"])  # the old result: the new one is missing
            else:
                durable.remove_tree(entry)


def _holds_only(folder: Path, result: str) -> bool:
    """Whether a folder contains nothing except regular files with names that this kind of result (adapter or model) can
    have."""
    names = RESULT_FILES[result]
    return all(names.fullmatch(entry.name) and durable.is_real_file(entry) for entry in folder.iterdir())
