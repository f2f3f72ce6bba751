"""Compares a run with a repetition of a part of the run: the metrics records, the checkpoint and the exported
result."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tunekit.artifacts.checkpoint import load_checkpoint
from tunekit.artifacts.fingerprint import MISSING, flat_values
from tunekit.artifacts.metrics_log import METRICS_NAME, Record, read_metrics
from tunekit.artifacts.run import RESULT_FILES, ROWS_NAME, read_json
from tunekit.files.durable import is_real_file, is_real_folder
from tunekit.files.tensors import tensor_bytes
from tunekit.files.untrusted import RUN_FILE, sha256_of

MEASURED = ("seconds", "tokens_per_second", "peak_bytes")  # parts of a record that depend on a clock or on the memory
UNRELATED = (  # values of a checkpoint that change no result, or that were compared before the first step
    *("loop.seconds", "loop.longest", "loop.starts", "loop.reactions", "loop.calibration", "loop.evaluated_step"),
    "fingerprint",
)
# JSON files of a finished run, with their values that depend on the place of the files, on a clock or on the memory
JSON_FILES: dict[str, tuple[str, ...]] = {
    "adapter/adapter_config.json": (),
    "adapter/tunekit.json": ("base.path", "files.adapter_config.json"),
    "plan.json": (
        *("budget_bytes", "choice", "notes", "peak_bytes", "recipe.evaluation.tasks", "recipe.output"),
        *("recipe.training.max_minutes",),
        *("trial_reason", "tries_longest_batch"),
    ),
    "report.json": (
        *("adapter_bytes", "budget_bytes", "calibration", "measured_bytes", "peak_allocated_bytes", "peak_host_bytes"),
        *("peak_requested_bytes", "peak_reserved_bytes", "predicted_bytes", "reactions", "seconds"),
        *("starts", "supervised_tokens_per_second", "tokens_per_second"),
    ),
}
MOST_TENSORS, MOST_VALUES = 3, 3  # that one message names


@dataclass(frozen=True)
class Mismatch:
    """A value that the repetition did not reproduce. `step`: the step after which it was recorded."""

    step: int
    what: str


class RecordComparison(NamedTuple):
    """The comparison of a run's metrics records with those of its repetition.

    `compared`: the number of compared records. `not_repeated`: the steps of evaluations that only the run computed,
    because a resume may change eval_steps. `not_recorded`: the steps of evaluations that only the repetition computed.
    """

    compared: int
    differences: list[Mismatch]
    not_repeated: list[int]
    not_recorded: list[int]


def compare_records(run: Path, repeat: Path, start: int, end: int | None) -> RecordComparison:
    """Compare the records in metrics.jsonl after step `start` up to `end` (None: the last step). The record of each
    step must be in both files."""
    ours, repeated = _records(run, start, end), dict(_records(repeat, start, end))
    keys = {key for key, _ in ours}
    ours += [(key, {}) for key in repeated if key not in keys and not key[1]]
    compared, differences = [each for each in ours if each[0] in repeated or not each[0][1]], []
    for key, record in sorted(compared, key=lambda each: each[0]):
        pairs = [dict(flat_values(values)) for values in (record, repeated.get(key, {}))]
        names = [name for name in {**pairs[0], **pairs[1]} if _text(pairs[0], name) != _text(pairs[1], name)]
        if names:
            shown = [f"{name} was {_text(pairs[0], name)}, is {_text(pairs[1], name)}" for name in names if name]
            differences.append(Mismatch(key[0], "; ".join(shown)))
    one_sided = (
        sorted(step for step, evaluates in each if evaluates) for each in (keys - {*repeated}, {*repeated} - keys)
    )
    return RecordComparison(len(compared), differences, *one_sided)


def _records(run: Path, start: int, end: int | None) -> list[tuple[tuple[int, bool], Record]]:
    """The records after step `start` up to `end`, without measured time and memory. Each has the key (step, whether it
    is an evaluation)."""
    first = start or -math.inf  # the evaluation before training has step 0
    return [
        ((record["step"], "eval" in record), {name: value for name, value in record.items() if name not in MEASURED})
        for record in read_metrics(run / METRICS_NAME)
        if first < record["step"] and (end is None or record["step"] <= end)
    ]


def _text(values: dict[str, object], name: str) -> str:
    return json.dumps(values[name]) if name in values else MISSING


def compare_checkpoints(ours: Path, theirs: Path) -> Iterator[Mismatch]:
    """Yields the differences between two checkpoints of the same step: weights, optimizer and loop state."""
    before, after = load_checkpoint(ours), load_checkpoint(theirs)
    names = [
        name
        for name in sorted({*before.tensors, *after.tensors})
        if name not in before.tensors
        or name not in after.tensors
        or before.tensors[name].dtype != after.tensors[name].dtype
        or before.tensors[name].shape != after.tensors[name].shape
        or tensor_bytes(before.tensors[name]) != tensor_bytes(after.tensors[name])
    ]
    if names:
        more = f" and {len(names) - MOST_TENSORS} more" if len(names) > MOST_TENSORS else ""
        yield Mismatch(before.step, f"the checkpoint has different bytes in {', '.join(names[:MOST_TENSORS])}{more}")
    facts = [dict(flat_values(checkpoint.facts, free=UNRELATED)) for checkpoint in (before, after)]
    for name in {**facts[0], **facts[1]}:
        was, is_ = (_text(values, name) for values in facts)
        if was != is_:
            yield Mismatch(before.step, f"a value in the checkpoint differs: {name} was {was}, is {is_}")


def result_hashes(run: Path) -> dict[str, str]:
    """sha256 of each weights file of the exported result, by its path in the run folder."""
    files = (file for name in RESULT_FILES for file in sorted((run / name).glob("*.safetensors")))
    return {file.relative_to(run).as_posix(): sha256_of(file, RUN_FILE) for file in files}


def _result_files(run: Path) -> Iterator[tuple[str, Path]]:
    """Every file and link in the folders of the result, with its path in the run folder."""
    for name in RESULT_FILES:
        for file in sorted((run / name).rglob("*")):
            if not is_real_folder(file):
                yield file.relative_to(run).as_posix(), file


def compare_files(run: Path) -> Iterator[Mismatch]:
    """Yields the contradictions between the files of a run that show without a repetition: records that are repeated or
    out of order, files that no result has, and a description of adapter_config.json that does not fit the file."""
    latest, step = {False: -math.inf, True: -math.inf}, 0
    for record in read_metrics(run / METRICS_NAME):
        step, evaluates = record["step"], "eval" in record
        if step <= latest[evaluates]:
            yield Mismatch(step, f"{METRICS_NAME} has a record of this step again, or after a later step")
        latest[evaluates] = max(step, latest[evaluates])
    for path, _ in _result_files(run):
        folder, _, name = path.partition("/")
        if not RESULT_FILES[folder].fullmatch(name):
            yield _foreign(step, path)
    config = run / "adapter" / "adapter_config.json"
    stated = ((read_json(config.with_name("tunekit.json")) or {}).get("files") or {}).get(config.name)
    if stated and is_real_file(config) and stated.get("sha256") != sha256_of(config, RUN_FILE):
        yield Mismatch(step, f"adapter/{config.name} is not the file that adapter/tunekit.json describes")


def _foreign(step: int, path: str) -> Mismatch:
    return Mismatch(step, f"{path} is not part of this result")


def compare_results(run: Path, repeat: Path, step: int) -> tuple[list[Mismatch], list[str]]:
    """The differences between both exported results, byte by byte, and between both reports and plans. In JSON files
    with values that depend on places, times or memory, all other values are compared. Also returns a description of
    each path that differs: this is no difference if the files were moved, so the path is not proved."""
    differences: list[Mismatch] = []
    moved: list[str] = []
    ours, theirs = (
        {path: sha256_of(file, RUN_FILE) for path, file in _result_files(folder) if path not in JSON_FILES}
        for folder in (run, repeat)
    )
    for path in sorted({*ours, *theirs}):
        if path not in theirs:
            differences.append(_foreign(step, path))
        elif ours.get(path) != theirs[path]:
            differences.append(Mismatch(step, f"{path} {'has different bytes' if path in ours else 'is missing'}"))
    for path, free in JSON_FILES.items():
        if (run / path).exists() and not (repeat / path).exists():
            differences.append(_foreign(step, path))
            continue
        before, after = (dict(flat_values(read_json(folder / path) or {}, free=free)) for folder in (run, repeat))
        shown = []
        for key in (key for key in {**before, **after} if key):
            was, is_ = (_text(values, key) for values in (before, after))
            if was != is_ and _is_moved(before.get(key), after.get(key)):
                moved.append(f"{path}: {key} is {before[key]}, and the audit used {after[key]}")
            elif was != is_:
                shown.append(f"{key} was {was}, is {is_}")
        if shown:
            differences.append(Mismatch(step, f"{path} has different values: {'; '.join(shown[:MOST_VALUES])}"))
    return differences, moved


def compare_rows(run: Path, repeat: Path, start: int) -> Iterator[Mismatch]:
    """Yields the differences between the losses of evaluation rows, if the repetition computed them after step `start`
    for the same step. A repetition from step 0 also computed the losses before training."""
    ours, theirs = (read_json(folder / ROWS_NAME) or {} for folder in (run, repeat))
    step, is_same = theirs.get("step", 0), theirs.get("step") == ours.get("step")
    before = [values.get("before" if values.get("step") else "losses") for values in (ours, theirs)]
    if not start and before[0] != before[1]:
        yield Mismatch(0, f"{ROWS_NAME} has different losses before training")
    if is_same and step > start and {**ours, "before": None} != {**theirs, "before": None}:
        yield Mismatch(step, f"{ROWS_NAME} has different rows or losses")


def _is_moved(was: object, is_: object) -> bool:
    """Whether two values may be paths of the same file or folder, which was moved."""
    return isinstance(was, str) and isinstance(is_, str) and os.path.isabs(was) and os.path.isabs(is_)
