"""Compares a run with a repetition of a part of the run: the metrics records, the checkpoint and the exported
result."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tunekit.artifacts.checkpoint import load_checkpoint
from tunekit.artifacts.fingerprint import MISSING, flat_values
from tunekit.artifacts.metrics_log import METRICS_NAME, Record, read_metrics
from tunekit.artifacts.run import RESULT_FILES, read_json
from tunekit.files.tensors import tensor_bytes
from tunekit.files.untrusted import RUN_FILE, sha256_of

MEASURED = ("seconds", "tokens_per_second", "peak_bytes")  # parts of a record that depend on a clock or on the memory
UNRELATED = (  # values of a checkpoint that change no result, or that were compared before the first step
    *("loop.seconds", "loop.longest", "loop.starts", "loop.reactions", "loop.calibration", "loop.evaluated_step"),
    "fingerprint",
)
MOVED = {  # JSON files of the result, with their values that depend on the place of the base
    "adapter/adapter_config.json": ("base_model_name_or_path",),
    "adapter/tunekit.json": ("base.path", "files.adapter_config.json"),
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


def _file_hashes(run: Path) -> dict[str, str]:
    """sha256 of each file of the result except the files in MOVED, by its path in the run folder."""
    files = (
        file for name, names in RESULT_FILES.items() for file in (run / name).glob("*") if names.fullmatch(file.name)
    )
    paths = {file.relative_to(run).as_posix(): file for file in files}
    return {path: sha256_of(file, RUN_FILE) for path, file in paths.items() if path not in MOVED}


def compare_results(run: Path, repeat: Path, step: int) -> Iterator[Mismatch]:
    """Yields the differences between both exported results, byte by byte. In files that contain the base's path, only
    values that do not depend on this path are compared."""
    ours, theirs = (_file_hashes(folder) for folder in (run, repeat))
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            missing = "is missing" if name in theirs else "is not part of this result"
            yield Mismatch(step, f"{name} {'has different bytes' if name in ours and name in theirs else missing}")
    for name, places in MOVED.items():
        before, after = (dict(flat_values(read_json(folder / name) or {}, free=places)) for folder in (run, repeat))
        if keys := [key for key in {**before, **after} if _text(before, key) != _text(after, key)]:
            shown = [f"{key} was {_text(before, key)}, is {_text(after, key)}" for key in keys if key]
            yield Mismatch(step, f"{name} has different values: {'; '.join(shown[:MOST_VALUES])}")
