"""`tunekit audit`: re-executes parts of a run in a temporary folder, and compares the resulting bytes with the
run's bytes.

A part of a run is the steps from one checkpoint to the next. For each part, the audit resumes a copy of the run at the
first of the two checkpoints, like `train --resume`.
"""

import gc
import hashlib
import platform
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from tunekit.artifacts.checkpoint import list_checkpoints, load_checkpoint
from tunekit.artifacts.equality import (
    JSON_FILES,
    Mismatch,
    compare_checkpoints,
    compare_files,
    compare_records,
    compare_results,
    compare_rows,
    result_hashes,
)
from tunekit.artifacts.fingerprint import EARLIER_SHARE, compare_fingerprints, has_earlier_share, recipe_values
from tunekit.artifacts.metrics_log import METRICS_NAME
from tunekit.artifacts.report.values import RunValues, Values, damage_named, read_run
from tunekit.artifacts.run import RESULT_FILES, ROWS_NAME, TASKS_NAME, is_finished, read_json, refuse_to_replace_part
from tunekit.artifacts.stopped import refuse_running, resume_command
from tunekit.console import Console
from tunekit.console.text import time_text
from tunekit.data.reading.folder import media_folder
from tunekit.data.reading.replaced import refuse_to_replace
from tunekit.data.reading.several import files_of, is_pattern
from tunekit.errors import InputError, NumericsError, Problem, RunFolderError, Stopped
from tunekit.files.durable import json_result
from tunekit.files.lock import LOCK_NAME
from tunekit.files.untrusted import RUN_RECORD, printable, sha256_of
from tunekit.files.work_folder import temporary_folder
from tunekit.machine.devices import Devices, deterministic_kernels, make_devices
from tunekit.machine.environment import accelerator_names, library_versions, processor_name
from tunekit.machine.signals import StopSignals
from tunekit.machine.threads import processors
from tunekit.recipe.load import LoadedRecipe, load_recipe
from tunekit.recipe.reading.draft import dotted
from tunekit.recipe.reading.paths import named_paths
from tunekit.records import JsonObject
from tunekit.targets.export import refuse_code
from tunekit.train import train_session
from tunekit.training import run_files
from tunekit.training.session import Session
from tunekit.training.time_limit import TimeLimit

COPIED = ("plan.json", "environment.json")  # files of the run that a resume reads
RECORDED = (METRICS_NAME, ROWS_NAME)  # read by a resume too; before step 1 they would be compared with themselves
READ = ("recipe.yaml", *RECORDED, LOCK_NAME)  # compared in every part, or without content
RESULT_VERSIONS = ("tunekit", "torch", "transformers")
HOW = "run the audit on the machine that computed the run, or on an equal machine"
EVALUATIONS = {
    "not_compared": "the evaluations after steps {} were not computed again, so their values are not proved",
    "not_recorded": "the run has no record of the evaluations after steps {}, which its recipe requires",
}
ROWS_UNREAD = "perhaps these steps did not read every training row; the audit proves nothing about unread rows"
DIFFERENT = "do not rely on it: train it again, or get its original files"
TASKS_UNPROVED = f"{TASKS_NAME}: the scores of tasks were not computed again, so they are not proved"


@dataclass(frozen=True, order=True)
class RunPart:
    """A part of the run: the steps after `start`, up to and including `end`. `exports`: whether the run's result is
    written after these steps."""

    start: int
    end: int
    exports: bool

    def __str__(self) -> str:
        return f"steps {self.start + 1} to {self.end}"


def audit_verb(
    run: str, count: int | None, seed: int | None, json_file: str | None, *, allow_code: bool = False
) -> None:
    """Re-execute `count` parts of the run, drawn by `seed` (None: all parts), and write the proved parts.

    Raises: NumericsError if a number differs; InputError if the run cannot be audited here.
    """
    if count is None and seed is not None:
        raise InputError("--seed decides which parts --parts draws, but --parts is missing", "add --parts N")
    path, devices, seed = Path(run), make_devices(), seed or 0
    values = read_run(path)
    loaded = load_recipe(path / "recipe.yaml")
    if not allow_code:
        refuse_code(path, loaded.recipe.model_dump(serialize_as_any=True))
    refuse_to_replace("--json", json_file, loaded)
    refuse_to_replace_part("--json", json_file, path)
    write_result, console = json_result(json_file), Console(json_file=json_file)
    with damage_named(path):
        checkpoints = dict(sorted(list_checkpoints(path / "checkpoints")))
        facts = {step: load_checkpoint(folder).facts for step, folder in checkpoints.items()}
        contradictions = list(compare_files(path))
    with _listing(contradictions), damage_named(path):
        _refuse(values, loaded, devices, list(facts.values()))
        parts = _parts(values, list(checkpoints))
    drawn = parts if count is None else sorted(random.Random(seed).sample(parts, min(count, len(parts))))
    torch.set_num_threads(int(values.environment.part("fingerprint").count("threads")))
    results = []
    deterministic = deterministic_kernels(loaded.recipe.training.deterministic)
    with StopSignals(announce=False) as signals, deterministic, _listing(contradictions):
        for part in drawn:
            began = time.monotonic()
            console.info(f"{part} of {parts[-1].end}: computing again ...")
            results.append(_repeat(part, path, facts.get(part.start), devices, signals))
            state = f"{len(results[-1]['differences'])} DIFFERENCES" if results[-1]["differences"] else "equal"
            console.info(f"{part}: {_compared(results[-1])}: {state} ({time_text(time.monotonic() - began)})")
            for name, what in EVALUATIONS.items():
                if steps := ", ".join(map(str, results[-1][name])):
                    console.warn(f"{part}: {what.format(steps)}")
            console.warn(*(f"{text}; paths are not proved" for text in results[-1]["moved"]))
    differences = [*contradictions, *(Mismatch(**each) for result in results for each in result["differences"])]
    complete = drawn == parts and _reads_every_row(values, loaded, parts[-1].end)
    write_result(_proof(values, loaded, parts, results, seed) | {"every_training_row_was_read": complete})
    if differences:
        problems = _problems(sorted(differences, key=lambda each: each.step))
        raise NumericsError.of([*problems, Problem("the run does not follow from its recipe and data", DIFFERENT)])
    _conclude(console, values, parts, drawn)
    for what in [*([] if complete else [ROWS_UNREAD]), *([TASKS_UNPROVED] if values.tasks else [])]:
        console.warn(what)


def _problems(differences: Sequence[Mismatch]) -> list[Problem]:
    return [Problem(f"step {each.step}: {each.what}") for each in differences]


@contextmanager
def _listing(contradictions: Sequence[Mismatch]) -> Iterator[None]:
    """Add the contradictions between the run's files to the reasons for which the block refuses the audit."""
    try:
        yield
    except InputError as error:
        raise type(error).of([*error.problems, *_problems(contradictions)]) from error


def _conclude(console: Console, values: RunValues, parts: Sequence[RunPart], drawn: Sequence[RunPart]) -> None:
    """Print how many steps were proved, and which files were not compared. Warn about steps after the last checkpoint
    of a stopped run."""
    last, end = max(record.count("step") for record in values.steps), parts[-1].end
    proved = "the whole run" if (drawn, last) == (parts, end) else f"{len(drawn)} of {len(parts)} parts"
    console.info(f"proved: {proved}, {sum(part.end - part.start for part in drawn)} of {last} steps")
    compared = {*READ, "checkpoints", *(RESULT_FILES | JSON_FILES if drawn[-1].exports else ())}
    others = sorted(each.name for each in values.path.iterdir() if each.name not in compared)
    console.info(f"not compared: {', '.join(map(printable, others))}")
    if last > end:
        console.warn(f"the steps after {end} have no checkpoint and are not proved")


def _compared(result: Mapping[str, Any]) -> str:
    """A list in words of the files and records that were compared."""
    names = [f"{result['records']} records", "checkpoint" if result["checkpoint"] else "", *result["weights"]]
    return ", ".join(filter(None, names))


def _parts(values: RunValues, steps: Sequence[int]) -> list[RunPart]:
    """The parts of the run. Their borders are step 0, the checkpoints, and the end of a finished run."""
    finished = values.status.get("exit_code") == 0
    has_result = any((values.path / name).exists() for name in RESULT_FILES)
    if finished and not has_result:
        what = f"{values.path} has finished, but it has no folder {' or '.join(RESULT_FILES)} to compare with"
        raise RunFolderError(what, "restore the folder")
    ended_at = Values(read_json(values.path / "report.json") or {}).count("final_step")
    resumed = 0 < ended_at < max(steps, default=0)  # the result is that of an earlier end, by training.max_minutes
    if has_result and not finished and not resumed:
        what = f"{values.path} has a result, but its status.json does not state that it finished"
        raise RunFolderError(what, "finish it with: tunekit train RECIPE --resume")
    last = max((record.count("step") for record in values.steps), default=0) if finished else 0
    ends = sorted({0, *steps, last})
    if len(ends) < 2:
        what = f"{values.path} has no result and no complete checkpoint to compare with"
        raise RunFolderError(what, f"continue it: {resume_command(values.path)}")
    return [RunPart(start, end, finished and end == ends[-1]) for start, end in pairwise(ends)]


def _reads_every_row(values: RunValues, loaded: LoadedRecipe, last: int) -> bool:
    """Whether the run has read all training rows by the end of step `last`. False if this is unknown: for streamed
    sources, and for sources with a weight below 1."""
    if any(source.weight < 1 or source.streaming for source in loaded.recipe.data.train):
        return False
    return any(record.count("step") == last and (record.number("epoch") or 0.0) >= 1 for record in values.steps)


# --- what is refused -----------------------------------------------------------------------------------------------


def _refuse(values: RunValues, loaded: LoadedRecipe, devices: Devices, facts: Sequence[JsonObject]) -> None:
    """Raises: InputError with every reason why equal bits are not guaranteed. `facts`: values of each checkpoint."""
    refuse_running(values.path, "start the audit when the run has ended")
    environment, kind = values.environment, devices.device.type
    past = environment.part("fingerprint")
    if not past:
        raise RunFolderError(f"{values.path} has no fingerprint in environment.json", "restore the file")
    now = library_versions()
    pairs = [(name, past.part("versions").get(name), now.get(name)) for name in RESULT_VERSIONS]
    pairs += [("device", past.get("device"), kind)]
    if kind == "cpu":
        pairs += [("processor", environment.get("cpu"), processor_name())]
    else:
        pairs += [("accelerator", past.get("accelerator"), next(iter(accelerator_names()), None))]
    precision = "float32_matmul_precision"
    pairs += [(precision, environment.get(precision), torch.get_float32_matmul_precision())]
    problems = [(f"{name} was {was}, is {is_}", HOW) for name, was, is_ in pairs if was != is_]
    problems += [(what, "equal bits are not promised for such a run") for what in _not_promised(values, loaded, facts)]
    recipe = recipe_values(loaded.recipe.model_dump(mode="json"))  # data and base are compared later, with the model
    for key, text in compare_fingerprints(past, past | {"recipe": recipe}):
        problems.append((f"{key}: changed since the run: {text}", "undo the change in the run's recipe.yaml"))
    if has_earlier_share(past):
        problems.append((EARLIER_SHARE, "audit the run with the version of tunekit that trained it"))
    threads = past.count("threads")
    if kind == "cpu" and not 1 <= threads <= processors():
        problems.append((f"the run computed with {threads} threads, but only {processors()} can be used here", HOW))
    if problems:
        raise InputError.of([Problem(what, how) for what, how in problems])


def _not_promised(values: RunValues, loaded: LoadedRecipe, facts: Sequence[JsonObject]) -> list[str]:
    """Reasons why the bits of the run depend on more than the recipe, the data and the base."""
    training, kind = loaded.recipe.training, values.environment.part("fingerprint").get("device")
    reasons = []
    if training.threads == "adaptive" and kind == "cpu":
        reasons.append("training.threads: adaptive (the number of threads depended on other programs)")
    if kind == "mps":
        reasons.append("Metal has no deterministic kernels")
    elif kind != "cpu" and not training.deterministic:
        reasons.append("training.deterministic is false, and a GPU adds in no fixed order")
    if (processes := values.environment.count("processes")) > 1:
        reasons.append(f"{processes} processes computed the run (the order of sums depends on their number)")
    for place in values.environment.parts("earlier"):
        reasons.append(
            f"a part of the run was computed elsewhere (processes: {place.count('processes')}, processor: "
            f"{place.get('processor')})"
        )
    if any(each["loop"].get("split_tokens") is not None for each in facts):
        reasons.append("micro-batches were split when memory ran out")
    return reasons


# --- computing again -----------------------------------------------------------------------------------------------


def _repeat(
    part: RunPart, run: Path, facts: JsonObject | None, devices: Devices, signals: StopSignals
) -> dict[str, Any]:
    """Resume a copy of the run at the start of a part, and compare it with the run at the end of the part. `facts`:
    values of the checkpoint at the start."""
    gc.collect()  # the model of the part before
    with temporary_folder() as folder:
        repeat = Path(folder) / "run"
        _copy(run, repeat, part.start, facts)
        changes = [f"output.dir={repeat}", "output.report_to=[]", "evaluation.tasks=[]", "training.max_minutes=null"]
        loaded, quiet = load_recipe(run / "recipe.yaml", changes), Console(enabled=False)
        last_step = None if part.exports else part.end
        limit = TimeLimit(ends_at=part.end if part.exports and not is_finished(run) else None)
        session = Session(loaded, devices, quiet, signals, last_step=last_step, limit=limit)
        with run_files.locked_folder(session, repeat, True, False):
            try:
                train_session(session, True)
            except Stopped as error:
                if signals.requested:
                    raise Stopped("stopped during the audit; nothing was proved", signals.requested) from error
        records, differences, not_repeated, not_recorded = compare_records(
            run, repeat, part.start, None if part.exports else part.end
        )
        ours, theirs = (place / "checkpoints" / f"step-{part.end:06d}" for place in (run, repeat))
        if ours.exists():
            differences += compare_checkpoints(ours, theirs)
        differences += compare_rows(run, repeat, part.start)
        moved: list[str] = []
        if part.exports:
            different, moved = compare_results(run, repeat, part.end)
            differences += different
        return {
            "start": part.start,
            "end": part.end,
            "records": records,
            "not_compared": not_repeated,
            "not_recorded": not_recorded,
            "checkpoint": sha256_of(ours / "tensors.safetensors", RUN_RECORD) if ours.exists() else None,
            "weights": result_hashes(run) if part.exports else {},
            "fingerprint": read_run(repeat).environment.part("fingerprint"),
            "moved": moved,
            "differences": [asdict(each) for each in sorted(differences, key=lambda each: each.step)],
        }


def _copy(run: Path, repeat: Path, start: int, facts: JsonObject | None) -> None:
    """Copy the files that a resume after step `start` reads. They include the best checkpoint, because a finished run
    exports it."""
    (repeat / "checkpoints").mkdir(parents=True)
    for name in (*COPIED, *(RECORDED if start else ())):
        if (run / name).exists():
            shutil.copyfile(run / name, repeat / name)
    best = None if facts is None else facts["loop"].get("best_step")
    for step in {start, best} - {0, None}:
        name = f"checkpoints/step-{step:06d}"
        if (run / name).exists():
            shutil.copytree(run / name, repeat / name)


# --- the proof -----------------------------------------------------------------------------------------------------


def _proof(
    values: RunValues, loaded: LoadedRecipe, parts: Sequence[RunPart], results: Sequence[dict[str, Any]], seed: int
) -> JsonObject:
    """The content of the --json file: the proved parts, and the inputs and programs of the audit."""
    now = results[0]["fingerprint"]
    return {
        "run": str(values.path),
        "equal": not any(result["differences"] for result in results),
        "steps": parts[-1].end,
        "proved_steps": sum(each["end"] - each["start"] for each in results if not each["differences"]),
        "seed": seed,
        "parts": [{name: value for name, value in each.items() if name != "fingerprint"} for each in results],
        "recipe": {"sha256": sha256_of(values.path / "recipe.yaml", RUN_RECORD), "values": now["recipe"]},
        "data": now["data"],
        "base": now["base"],
        "files": _file_hashes(loaded),
        "versions": library_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": processor_name(),
        "device": now["device"],
        "accelerator": now["accelerator"],
        "threads": now["threads"],
    }


def _file_hashes(loaded: LoadedRecipe) -> dict[str, str]:
    """The sha256 of every local file that the recipe reads, by the recipe's key. For a folder or a pattern, it is the
    sha256 of the names and hashes of its files."""
    paths = named_paths(loaded.recipe.model_dump(mode="json", exclude={"output"}))
    return {dotted(path.key): _hash_of(path.file) for path in paths if path.file.exists() or is_pattern(path.text)}


def _hash_of(path: Path) -> str:
    if path.is_file():
        return sha256_of(path, RUN_RECORD)
    several = files_of(str(path)) if is_pattern(str(path)) else path.rglob("*")
    folder, files = media_folder(str(path)), sorted(file for file in several if file.is_file())
    lines = (f"{sha256_of(file, RUN_RECORD)}  {file.relative_to(folder).as_posix()}\n" for file in files)
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
