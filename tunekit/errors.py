"""All errors for users. An error states the place (file, line, key), what is wrong, how to mend it, and the exit code.
This module also removes secrets from printed text."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

_PREFIX = r"\b(?:hf_|api_org_|sk-(?:proj-)?|gh[pousr]_|github_pat_|glpat-)"  # prefixes of access tokens
_OTHER_SECRET = (
    r"\bsk-(?:proj|svcacct|admin|ant|or)-[\w-]{20,}|\bglpat-[\w-]{20,}|\bAKIA[0-9A-Z]{16}\b|\bxox[abprs]-[\w-]{10,}"
    r"|\bAIza[\w-]{35}|-----BEGIN [A-Z ]*PRIVATE KEY"
)
_PASSWORD = r"(?<=://)(?:[^\s/:@\"'<>]*:(?!\d+/)[^\s\"'<>]*|[^/\s@]+)(?=@)"  # a password may contain @ and /
EXIT_FAULT, EXIT_INTERRUPTED = 1, 130
MAX_LINES = 100  # of one list of problems or notes
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MAYBE_SECRET = re.compile(f"{_PREFIX}[A-Za-z0-9_-]{{8,}}|{_OTHER_SECRET}|{_PASSWORD}")
# Unfinished results: files.durable.temporary_name, and with eight letters files.work_folder.work_folder.
_UNFINISHED = re.compile(r"\.(?P<name>.+)\.part-(?:\d{11,}(?:\.old)?|(?P<work>[a-z0-9_]{8}))")
# a shorter text may be a name, such as the folder hf_checkpoints
_SURE_SECRET = re.compile(f"{_PREFIX}[A-Za-z0-9]{{22,}}|{_OTHER_SECRET}|{_PASSWORD}")


def redact(text: str) -> str:
    """The text with [secret] in place of access tokens, and of user:password in addresses."""
    return _MAYBE_SECRET.sub("[secret]", text)


def asked_path(path: Path) -> Path:
    """The path that the user asked for: the same path, if it is not the hidden one of an unfinished result. A work
    folder contains the result under its own name, and other files that the user does not know."""
    for index, part in enumerate(path.parts):
        if match := _UNFINISHED.fullmatch(part):
            first, *rest = path.parts[index + 1 :] or ("",)
            inside = rest if first == match["name"] else [] if match["work"] else [first, *rest]  # "" changes no path
            return asked_path(Path(*path.parts[:index], match["name"], *inside))
    return path


def holds_secret(text: str) -> bool:
    """Whether a text contains an access token, or an address with user and password."""
    return _SURE_SECRET.search(text) is not None


def first_lines(lines: Sequence[object]) -> list[str]:
    """The first MAX_LINES lines; if there are more, also a line that states the number of omitted lines."""
    shown = [str(line) for line in lines[:MAX_LINES]]
    return shown if len(lines) <= MAX_LINES else [*shown, f"... and {len(lines) - MAX_LINES:,} more like these"]


def listed(names: Sequence[object], most: int) -> str:
    """The first `most` names; if there are more, also the number of the other names."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(map(str, names[:most]))}{more}"


@dataclass(frozen=True)
class Problem:
    """One problem, printed as one line: `file:line: key: what; how`. `how`: how to mend it."""

    what: str
    how: str = ""
    file: str | None = None
    line: int | None = None
    key: str | None = None

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file and self.line else self.file
        text = ": ".join(filter(None, (place, self.key, self.what)))
        return f"{text}; {self.how}" if self.how else text


class TunekitError(Exception):
    """Base class of all errors for users. `problems`: all problems, not only the first one.

    Create it from the words of one problem, `DataError("row is not an object", "write {...}", file=f, line=3)`,
    or from several problems, `RecipeError.of(problems)`.
    """

    exit_code = 1
    alone: bool | None = None  # whether this rank must print it: no if the main rank prints it; None: nobody asked yet
    notes: tuple[str, ...] = ()  # printed before the problems, such as rewritten keys of other tools
    verdict = ""  # printed after the problems

    def __init__(
        self, what: str, how: str = "", *, file: str | None = None, line: int | None = None, key: str | None = None
    ) -> None:
        self.problems: tuple[Problem, ...] = (Problem(what, how, file, line, key),)
        super().__init__(str(self.problems[0]))

    @classmethod
    def of(cls, problems: Sequence[Problem], notes: Sequence[str] = ()) -> TunekitError:
        """One error with all these problems."""
        problems = tuple(dict.fromkeys(problems))  # two checks may report the same problem
        first = problems[0]
        error = cls(first.what, first.how, file=first.file, line=first.line, key=first.key)
        error.problems, error.notes = problems, tuple(notes)
        error.args = ("\n".join(str(problem) for problem in problems),)
        return error

    def without_file(self, removed: Path) -> TunekitError:
        """A copy of the error for a file `removed` that was not written. The copy states this, and names no lines of
        the file."""
        problems = [
            replace(each, file=None, line=None) if each.file and Path(each.file) == removed else each
            for each in self.problems
        ]
        return type(self).of(problems, [*self.notes, f"{removed} is not written, because:"])

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the error with all its problems, so that it can be sent to a different process."""
        return type(self).of, (self.problems,)


class InputError(TunekitError):
    """The recipe or another input is wrong. `resume_advice`: the advice to print if this error ended a run
    that has a checkpoint."""

    exit_code = 2
    resume_advice = "repair it, and continue with --resume"


class RecipeError(InputError):
    """The recipe is wrong: its syntax, a key, a value, or a contradiction."""


class DataError(InputError):
    """A data file or a row is wrong."""


class LengthError(InputError):
    """A text has more tokens than the model can read, or than the memory has room for."""


class ModelError(InputError):
    """A base model's folder, configuration or tokenizer is wrong."""


class AdapterError(InputError):
    """An adapter folder is wrong, or an adapter does not fit its base."""


class AdapterConflict(InputError):
    """Two adapters cannot be in memory together, although each of them can be loaded alone."""


class RewardError(InputError):
    """A reward is wrong: its file, or a value that it returned."""

    resume_advice = "continue with --resume; if you repaired the reward's file, add --accept-changed objective.reward"


class RunFolderError(InputError):
    """The run folder cannot be used: it is locked, a resume is refused, or it contains a finished run."""


class NumericsError(TunekitError):
    """The numbers are invalid: a non-finite loss or gradient, a collapsed loss scale, or an audit that computed
    different numbers.
    """

    exit_code = 3


class ResourceError(TunekitError):
    """Memory, disk or another resource ran out, or a budget cannot be met."""

    exit_code = 4


class OtherRankError(ResourceError):
    """Another rank of this run has failed, or is lost. The exit code is that of the other rank, if it is known."""


class Stopped(TunekitError):
    """A signal asked the run to stop; a checkpoint has been written. Exit code 128 + signal number."""

    def __init__(self, what: str, signal_number: int, how: str = "") -> None:
        super().__init__(what, how)
        self.exit_code = 128 + signal_number


MEMORY_MESSAGES = (  # the messages of out-of-memory errors that have a general class
    *("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory"),
    *("CUDA error: out of memory", "HIP error: out of memory", "MPS backend out of memory", "OUT_OF_DEVICE_MEMORY"),
    *("BLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "ALLOCATION_FAILED", "miopenStatusAllocFailed"),
    *("Cuda failure 2 'out of memory'", "cudaErrorMemoryAllocation"),  # NCCL, which allocates beside torch
    # cuDNN: no algorithm's workspace fits; accelerate treats these messages in the same way
    *("CUDNN_STATUS_NOT_SUPPORTED", "valid cuDNN algorithm", "unable to find an engine to execute this computation"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on a device or on the host."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, known by name
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in MEMORY_MESSAGES)


def exit_message(error: BaseException) -> tuple[str, int]:
    """The message of an error that ends a command, one line for each problem, and the exit code."""
    if isinstance(error, TunekitError):
        return "\n".join(filter(None, [*error.notes, *first_lines(error.problems), error.verdict])), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", EXIT_INTERRUPTED
    if is_out_of_memory(error):
        keys = "training.micro_batch_size, evaluation.batch_size or data.max_length"
        return f"memory ran out; free memory, or lower {keys}", ResourceError.exit_code
    cause = error.__context__
    if isinstance(error, RuntimeError) and isinstance(cause, OSError) and cause.errno == errno.ELOOP:
        error = cause  # Path.resolve before Python 3.13: "Symlink loop"
    if isinstance(error, OSError):
        full = error.errno in _NO_SPACE
        place = error.filename2 if full and error.filename2 is not None else error.filename  # of a copy
        named = f"{asked_path(Path(os.fsdecode(place)))}: " if isinstance(place, str | bytes | os.PathLike) else ""
        if full:
            return (
                f"{named}no space left on the disk; free some space, or choose another folder",
                ResourceError.exit_code,
            )
        if named:
            return f"{named}{error.strerror}; check the path and its permissions", InputError.exit_code
    words = " ".join(str(error).split())[:300]
    what = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return f"this is a bug in tunekit: {what}; run `tunekit --debug ...` for the traceback", EXIT_FAULT
