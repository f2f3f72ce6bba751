"""Compares a re-executed part of a run with the files of the run: the records, the checkpoint and the result."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tunekit.artifacts.checkpoint import load_checkpoint
from tunekit.artifacts.fingerprint import MISSING, flat_values
from tunekit.artifacts.metrics_log import METRICS_NAME, Record, read_metrics
from tunekit.artifacts.run import RESULT_FILES, read_json
from tunekit.files.tensors import tensor_bytes
from tunekit.files.untrusted import RUN_FILE, sha256_of

MEASURED = ("seconds", "tokens_per_second", "peak_bytes")  # parts of a record that a clock or the memory gives
UNRELATED = (  # values of a checkpoint that no result depends on, or that were compared before the first step
    *("loop.seconds", "loop.reactions", "loop.calibration", "loop.evaluated_step", "fingerprint"),
)
BASE_PATH = "base_model_name_or_path"  # of adapter_config.json; the base may have been moved
MOST_TENSORS = 3  # tensors that one message names


@dataclass(frozen=True)
class Mismatch:
    """A value that the re-execution did not reproduce. `step`: the step after which it was recorded."""

    step: int
    what: str


def compare_records(run: Path, repeat: Path, start: int, end: int) -> tuple[int, list[Mismatch]]:
    """Compare metrics.jsonl after step `start` up to `end`; returns how many records were compared.

    Every step must be in both. An evaluation is compared if both have it, because a resume may change eval_steps.
    """
    ours, theirs = (_records(folder, start, end) for folder in (run, repeat))
    differences = []
    compared = [key for key in sorted({*ours, *theirs}) if not key[1] or (key in ours and key in theirs)]
    for key in compared:
        pairs = [dict(flat_values(records.get(key, {}))) for records in (ours, theirs)]
        names = [name for name in {**pairs[0], **pairs[1]} if _text(pairs[0], name) != _text(pairs[1], name)]
        if names:
            shown = [f"{name} was {_text(pairs[0], name)}, is {_text(pairs[1], name)}" for name in names if name]
            differences.append(Mismatch(key[0], "; ".join(shown)))
    return len(compared), differences


def _records(run: Path, start: int, end: int) -> dict[tuple[int, bool], Record]:
    """The records of these steps by (step, whether it is an evaluation), without measurements."""
    first = start if start else -1  # the evaluation before training has step 0
    return {
        (record["step"], "eval" in record): {name: value for name, value in record.items() if name not in MEASURED}
        for record in read_metrics(run / METRICS_NAME)
        if first < record["step"] <= end
    }


def _text(values: dict[str, object], name: str) -> str:
    return json.dumps(values[name]) if name in values else MISSING


def compare_checkpoints(ours: Path, theirs: Path) -> Iterator[Mismatch]:
    """Compare weights, optimizer and loop state of two checkpoints of the same step."""
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
        yield Mismatch(before.step, f"the checkpoint has other bytes in {', '.join(names[:MOST_TENSORS])}{more}")
    facts = [dict(flat_values(checkpoint.facts, free=UNRELATED)) for checkpoint in (before, after)]
    for name in {**facts[0], **facts[1]}:
        was, is_ = (_text(values, name) for values in facts)
        if was != is_:
            yield Mismatch(before.step, f"the checkpoint has another value: {name} was {was}, is {is_}")


def result_hashes(run: Path) -> dict[str, str]:
    """sha256 of each file of weights of the exported result, by its path in the run folder."""
    files = (file for name in RESULT_FILES for file in sorted((run / name).glob("*.safetensors")))
    return {file.relative_to(run).as_posix(): sha256_of(file, RUN_FILE) for file in files}


def compare_results(run: Path, repeat: Path, step: int) -> Iterator[Mismatch]:
    """Compare the exported weights byte by byte, and the adapter's configuration apart from the path of the base."""
    ours, theirs = result_hashes(run), result_hashes(repeat)
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            yield Mismatch(step, f"{name} {'has other bytes' if name in ours and name in theirs else 'is missing'}")
    configs = [read_json(folder / "adapter" / "adapter_config.json") or {} for folder in (run, repeat)]
    before, after = ({name: value for name, value in config.items() if name != BASE_PATH} for config in configs)
    if before != after:
        yield Mismatch(step, "adapter/adapter_config.json has other values")
