"""metrics.jsonl: one JSON object per line, appended during a run. This module writes and reads it."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tunekit.errors import RunFolderError
from tunekit.files import durable
from tunekit.files.untrusted import RUN_RECORD, open_regular
from tunekit.records import EvaluationRecord, JsonObject, StepRecord

METRICS_NAME = "metrics.jsonl"
Record = JsonObject  # one line: `step`, and the numbers of a step or the `eval` of an evaluation
LoggedLine = tuple[int, Record]  # the offset of the line's end in the file, and its record
BESIDE = ("classes", "samples", "sources", "search")  # fields of an evaluation in addition to its metrics


def record_line(record: StepRecord | EvaluationRecord) -> bytes:
    """The line for a record in metrics.jsonl. A step is a flat JSON object; an evaluation is {step, eval: {...}},
    without non-finite numbers."""
    if isinstance(record, EvaluationRecord):
        finite = {name: value for name, value in record.metrics.items() if math.isfinite(value)}  # JSON has no NaN
        value: Record = {"step": record.step, "eval": finite}
        value |= {name: found for name in BESIDE if (found := getattr(record, name)) is not None}
    else:
        value = asdict(record)
        value |= value.pop("metrics")
        for name in ("samples", "threads"):
            if value[name] is None:
                del value[name]
        if not math.isfinite(record.grad_norm):
            value["grad_norm"] = None  # float16 overflowed, and the step was skipped
    return (json.dumps(value, allow_nan=False) + "\n").encode("ascii")


def append_line(path: Path, line: bytes) -> None:
    """Append one line, completely or not at all: if the disk is full, the part that was written is removed again."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    number = durable.effect("create", path, lambda: durable.open_file(path, flags))
    try:
        before = os.fstat(number).st_size
        try:
            done = 0
            while done < len(line):
                done += durable.effect("write", path, partial(os.write, number, line[done:]), len(line))
        except BaseException:
            os.ftruncate(number, before)
            raise
    finally:
        os.close(number)


def records_from(path: Path, offset: int = 0) -> Iterator[LoggedLine]:
    """Yields the complete lines of the file, starting at the byte `offset`, each as (offset of the line's end, record).
    An incomplete last line is ignored.

    Raises: RunFolderError if a line is damaged, with the line's number if `offset` is 0.
    """
    data, all_lines = b"", offset == 0
    if path.exists():
        with open_regular(path, RUN_RECORD) as (number, _), open(number, "rb", closefd=False) as file:
            file.seek(offset)
            data = file.read()
    start = offset
    for number, line in enumerate(data.split(b"\n"), start=1):
        torn = offset - start + len(line) >= len(data)  # no newline after it
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("not a record")
        except (ValueError, RecursionError) as error:
            if torn:
                return
            how, at = f"remove the line ({error})", number if all_lines else None
            raise RunFolderError("this line is not a metrics record", how, file=str(path), line=at) from None
        if torn:
            return
        offset += len(line) + 1
        yield offset, record


def read_metrics(path: Path) -> list[Record]:
    """All complete records, in order.

    Raises: RunFolderError with the line number if a line in the middle is damaged.
    """
    return [record for _, record in records_from(path)]


def truncate_metrics(path: Path, step: int, evaluated_step: int | None = None) -> int:
    """Cut the file before its first record after `step`, before its first evaluation after `evaluated_step` (None:
    `step`), and before an incomplete last line. Returns the number of remaining records."""
    if not path.exists():
        return 0
    end, remaining = 0, 0
    for offset, record in records_from(path):
        if record["step"] > (step if evaluated_step is None or "eval" not in record else evaluated_step):
            break
        end, remaining = offset, remaining + 1
    if end < path.stat().st_size:
        durable.truncate(path, end)
    return remaining
