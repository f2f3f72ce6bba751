"""Runs tests/gpu, the most important tests first, and records the outcome of each test as soon as it is known.

A test that crashes the process, hangs, or breaks the state of the device costs only itself: another process continues
with the tests that are left.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tunekit.machine.variables import variables

REPOSITORY = Path(__file__).resolve().parents[2]
SUITE = "tests/gpu"
TEST_SECONDS, START_SECONDS = 150.0, 180.0  # of one test; of a process before it has collected the tests
POLL_SECONDS = 0.2
MESSAGE_CHARACTERS = 600
# The first twelve are the half that says most: what only a real device can refute, and what the other calls rely on.
ORDER = (
    "test_no_step_waits_for_the_device",
    "test_a_run_from_end_to_end",
    "test_streamed_layers_change_no_bit",
    "test_four_bits_are_the_same_on_both_devices",
    "test_the_peak_is_foreseen_within_5_percent",
    "test_fused_groups_equal_plain_layers",
    "test_packed_documents_equal_padded_rows",
    "test_resume_changes_no_bit",
    "test_resume_changes_no_bit_of_long_documents",
    "test_a_gradient_that_is_not_finite_changes_no_weight",
    "test_out_of_memory_ends_with_4_or_a_split",
    "test_recomputed_layers_change_no_bit_with_dropout",
    "test_a_prompt_computed_once_equals_one_for_each_answer",
    "test_float8_products_are_those_of_the_double",
    "test_speed_and_memory_are_recorded_for_each_step",
    "test_liger_kernels_give_the_same_gradient",
)


def function_of(test: str) -> str:
    """The name of a test's function."""
    return test.rpartition("::")[2].partition("[")[0]


def read_outcomes(file: Path) -> dict[str, dict[str, Any]]:
    """The last outcome of each test."""
    return {record.pop("test"): record for record in _records(file) if "outcome" in record}


def _records(file: Path) -> list[dict[str, Any]]:
    """The file's lines. The last line of a process that was killed may be incomplete."""
    records = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def run_suite(
    file: Path, seconds: float, *, plugins: tuple[str, ...] = (), suite: str = SUITE, test_seconds: float = TEST_SECONDS
) -> dict[str, dict[str, Any]]:
    """The outcomes of all tests, also of earlier calls with this file. Stops after `seconds`."""
    ends = time.monotonic() + seconds
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-p", "outcomes", suite]
    command += [argument for plugin in plugins for argument in ("-p", plugin)]
    paths = [str(Path(__file__).parent), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = variables() | os.environ | {"TUNEKIT_OUTCOMES": str(file), "PYTHONPATH": os.pathsep.join(paths)}
    problem = "no time was left"
    while time.monotonic() < ends:
        before, size = len(read_outcomes(file)), file.stat().st_size if file.exists() else 0
        with file.with_suffix(".log").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, start_new_session=True
            )
            try:
                problem = _watch(process, file, ends, test_seconds, size) or f"ended with {process.returncode}"
            finally:  # also after Ctrl-C
                stop(process)
        problem += f": {file.with_suffix('.log').read_text(encoding='utf-8')[-MESSAGE_CHARACTERS:]}"
        if time.monotonic() < ends:  # a test that the call's end stopped runs again in the next call
            _blame(file, problem, size)
        outcomes = read_outcomes(file)
        if len(outcomes) == before or not _left(file, outcomes):
            break
    return read_outcomes(file) or {suite: {"outcome": "failed", "message": problem}}


def _left(file: Path, outcomes: dict[str, Any]) -> bool:
    """Whether a collected test has no outcome."""
    collected = next((record["collected"] for record in reversed(_records(file)) if "collected" in record), [])
    return any(test not in outcomes for test in collected)


def _watch(process: subprocess.Popen[bytes], file: Path, ends: float, test_seconds: float, before: int) -> str | None:
    """Wait for the process. Returns why it was stopped: no new line for `test_seconds`, or the time is over.

    `before`: the file's bytes before the process.
    """
    size, changed = before, time.monotonic()
    while process.poll() is None:
        now, current = time.monotonic(), file.stat().st_size if file.exists() else 0
        if current != size:
            size, changed = current, now
        if now - changed > (START_SECONDS if size == before else test_seconds) or now > ends:
            return f"stopped after {now - changed:.0f} s"
        time.sleep(POLL_SECONDS)
    return None


def exit_at_sigterm() -> None:
    """Make SIGTERM raise SystemExit, so that the processes that this one started are stopped, too."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def stop(process: subprocess.Popen[Any]) -> None:
    """End the process and everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _blame(file: Path, problem: str, size: int) -> None:
    """Record an outcome for the test that was running when the process ended. `size`: the file's bytes before the
    process."""
    if not file.exists():
        return
    with file.open("r+b") as lines:
        lines.seek(size)
        records = [json.loads(line) for line in lines.read().splitlines() if line.endswith(b"}")]
        if records and set(records[-1]) == {"test"}:
            record = {"test": records[-1]["test"], "outcome": "failed", "message": problem}
            lines.write(f"\n{json.dumps(record)}\n".encode())


def counts(outcomes: dict[str, dict[str, Any]]) -> str:
    """For example "30 passed, 2 failed, 4 skipped"."""
    number = Counter(record["outcome"] for record in outcomes.values())
    return ", ".join(f"{number[kind]} {kind}" for kind in ("passed", "failed", "skipped") if number[kind]) or "none run"
