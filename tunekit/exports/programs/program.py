"""Programs that read exports: finding an installed program, running it, and ending it."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

import numpy as np

from tunekit.contracts import Array
from tunekit.errors import InputError, ResourceError, TunekitError
from tunekit.exports.programs.versions import PROGRAMS, STAMP, interpreter, programs_folder
from tunekit.files.durable import FULL, free_bytes, is_own
from tunekit.files.work_folder import temporary_folder
from tunekit.records import JsonObject

INSIDE = Path(__file__).parent / "inside"  # scripts that a program's own Python runs
LIMIT_SECONDS, CONVERSION_SECONDS = 1800.0, 24 * 3600.0
SMALLEST_FREE_BYTES = 4096  # a block: with less, no file can grow
LOG_LINES, LINE_LENGTH = 3, 200  # of the log in an error message
ENVIRONMENT = {  # of every program: no network; ggml states a failed assertion in its last line, without a debugger
    **dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "GGML_NO_BACKTRACE"), "1"),
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Program:
    """An installed program. `python`: the interpreter that imports it."""

    name: str
    version: str
    python: Path


def find_program(name: str) -> Program | None:
    """The program in its own environment; else in tunekit's environment, if its packages there have the major
    versions that PROGRAMS states. None if it is not installed. An environment that another user made is not run."""
    packages, stamp, python = PROGRAMS[name], programs_folder() / name / STAMP, interpreter(name)
    installed = json.loads(stamp.read_text("utf-8")) if stamp.is_file() else []
    first, wanted = next(iter(packages.versions.items()))
    if installed and python.exists() and all(map(_is_trusted, (stamp, python, python.parent, stamp.parent))):
        return Program(name, _version_text(name, first, installed[0].partition("==")[2]), python)
    for versions in (packages.versions, *({other: wanted} for other in packages.other_names)):
        number = _installed_version(versions)
        if number is not None:
            return Program(name, _version_text(name, next(iter(versions)), number), Path(sys.executable))
    return None


def _is_trusted(path: Path) -> bool:
    """Whether a path belongs to this user or to the administrator."""
    return is_own(path) or path.lstat().st_uid == 0


def _installed_version(wanted: Mapping[str, str]) -> str | None:
    """The version of the first distribution in `wanted`; None unless tunekit's environment has all of them in these
    major versions."""
    try:
        numbers = {distribution: version(distribution) for distribution in wanted}
    except PackageNotFoundError:
        return None
    fits = all(_major(numbers[distribution]) == _major(number) for distribution, number in wanted.items())
    return numbers[next(iter(wanted))] if fits else None


def _version_text(name: str, distribution: str, number: str) -> str:
    return number if name == distribution else f"{number} of {distribution}"


def _major(number: str) -> str:
    return number.partition(".")[0]


def run_script(
    program: Program,
    script: str,
    request: JsonObject,
    *,
    arrays: Mapping[str, Array] | None = None,
    environment: Mapping[str, str] | None = None,
    seconds: float = LIMIT_SECONDS,
) -> dict[str, Array]:
    """Run a script of inside/, and return the arrays that it computes for a request. `arrays`: large values of the
    request.

    Raises: InputError with the last lines of the program's log if it fails or takes longer than `seconds`;
    ResourceError if a disk is full.
    """
    with temporary_folder() as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request), "utf-8")
        np.savez(folder / "request.npz", **(arrays or {}))  # type: ignore[arg-type]  # they are no options
        command = [str(program.python), "-I", str(INSIDE / "run.py"), script, str(folder)]
        with running(program, command, folder / "log", environment or {}) as process:
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                raise failure(program, f"took longer than {seconds:.0f} s", folder / "log") from None
        if code or not (folder / "answer.npz").is_file():
            raise failure(program, f"ended with {ended_text(code)}", folder / "log")
        with np.load(folder / "answer.npz", allow_pickle=False) as answer:
            return dict(answer)


@contextlib.contextmanager
def running(
    program: Program, command: Sequence[str], log: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process of the program during a block. After the block, an error or Ctrl-C, the process and
    its children are killed."""
    values = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    with log.open("wb") as stream:
        process = _start(command, stream, {**values, **ENVIRONMENT, **environment})
        try:
            yield process
        finally:
            _end(process)


def _start(command: Sequence[str], log: IO[bytes], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a process in a separate process group. The terminal's Ctrl-C does not reach it, so tunekit ends it."""
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # closed when tunekit is killed, which the scripts notice
        stdout=log,
        stderr=subprocess.STDOUT,
        env=dict(environment),
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and the processes that it started, if any are left (macOS does not permit to kill a zombie)."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def ended_text(code: int) -> str:
    """An exit code in words: the signal's name, if a signal ended the process."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def failure(program: Program, what: str, log: Path) -> TunekitError:
    """The error of a program that failed, with the last lines of its log. A full disk is known by the words of the
    operating system, because other languages give no number, or by the log's own disk, which may have cut the log."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    last = " | ".join(re.sub(r"\x1b\[[0-9;]*m", "", line)[:LINE_LENGTH] for line in lines[-LOG_LINES:])
    text = f"{program.name} {program.version} {what}{': ' if last else ''}{last}"
    if free_bytes(log) < SMALLEST_FREE_BYTES or any(os.strerror(number) in last for number in FULL):
        return ResourceError(text, f"free some space on the disks of the output and of {log.parent.parent}")
    return InputError(text, f"install a different version of {program.name}, or choose a different --to or --type")
