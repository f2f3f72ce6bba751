"""Every error a user can meet: where it is (file, line, key), what is wrong, how to mend it, and the exit code; and
the filter for secrets that all printed text passes.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from dataclasses import dataclass

_PREFIX = r"\b(?:hf_|api_org_|sk-(?:proj-)?|gh[pousr]_|github_pat_|glpat-)"  # of access tokens
_PASSWORD = r"(?<=://)[^/\s@]+(?=@)"
EXIT_FAULT, EXIT_INTERRUPTED = 1, 130
MAX_LINES = 100  # of one list of problems or notes; nobody reads more
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MAYBE_SECRET = re.compile(f"{_PREFIX}[A-Za-z0-9_-]{{8,}}|{_PASSWORD}")
_SURE_SECRET = re.compile(f"{_PREFIX}[A-Za-z0-9]{{22,}}|{_PASSWORD}")  # longer: a folder may be called hf_checkpoints


def redact(text: str) -> str:
    """`text` with [secret] instead of access tokens and of user:password in addresses."""
    return _MAYBE_SECRET.sub("[secret]", text)


def holds_secret(text: str) -> bool:
    """Whether text holds what is an access token by its length, or an address with a user and password."""
    return _SURE_SECRET.search(text) is not None


def first_lines(lines: Sequence[object]) -> list[str]:
    """The lines, of which so many are shown and the others counted."""
    shown = [str(line) for line in lines[:MAX_LINES]]
    return shown if len(lines) <= MAX_LINES else [*shown, f"... and {len(lines) - MAX_LINES:,} more like these"]


def listed(names: Sequence[object], most: int) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(map(str, names[:most]))}{more}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, as one line: `file:line: key: what; how to mend`."""

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
    """Base of all errors meant for a user; `problems` holds every problem found, not only the first.

    Make one with the words of a single problem, `DataError("row is not an object", "write {...}", file=f, line=3)`,
    or with several: `RecipeError.of(problems)`.
    """

    exit_code = 1
    alone = False  # whether one of several ranks has this error, and no other rank prints it
    notes: tuple[str, ...] = ()  # said before the problems, such as the spellings of other tools that were rewritten

    def __init__(
        self, what: str, how: str = "", *, file: str | None = None, line: int | None = None, key: str | None = None
    ) -> None:
        self.problems: tuple[Problem, ...] = (Problem(what, how, file, line, key),)
        super().__init__(str(self.problems[0]))

    @classmethod
    def of(cls, problems: Sequence[Problem], notes: Sequence[str] = ()) -> TunekitError:
        """Wrap every problem of one pass in one error."""
        problems = tuple(dict.fromkeys(problems))  # two parts may have found the same one
        first = problems[0]
        error = cls(first.what, first.how, file=first.file, line=first.line, key=first.key)
        error.problems, error.notes = problems, tuple(notes)
        error.args = ("\n".join(str(problem) for problem in problems),)
        return error

    def __reduce__(self) -> tuple[object, ...]:
        """The form in which the error is sent to a different process."""
        return type(self).of, (self.problems,)


class InputError(TunekitError):
    """The recipe or another input is wrong. `resume_advice`: printed if a run with a checkpoint ended because of it."""

    exit_code = 2
    resume_advice = "repair it, and continue with --resume"


class RecipeError(InputError):
    """The recipe: syntax, keys, values, contradictions."""


class DataError(InputError):
    """A data file or row."""


class ModelError(InputError):
    """A base model folder, its configuration or its tokenizer."""


class AdapterError(InputError):
    """An adapter folder, or an adapter that does not fit its base."""


class RewardError(InputError):
    """A reward: its file, or what it gave back."""

    resume_advice = "continue with --resume; if you repaired the reward's file, add --accept-changed objective.reward"


class RunFolderError(InputError):
    """The run folder: a held lock, a refused resume, a finished run in the way."""


class NumericsError(TunekitError):
    """The numbers went wrong: non-finite loss or gradient, a collapsed loss scale."""

    exit_code = 3


class ResourceError(TunekitError):
    """Memory, disk or another resource ran out, or a budget cannot be met."""

    exit_code = 4


class Stopped(TunekitError):
    """A signal asked the run to stop; a checkpoint has been written. Exit code 128 + signal number."""

    def __init__(self, what: str, signal_number: int) -> None:
        super().__init__(what)
        self.exit_code = 128 + signal_number


MEMORY_MESSAGES = (  # of errors that have no class of their own: the host's, a driver's, a library's on the device
    *("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory"),
    *("CUDA error: out of memory", "HIP error: out of memory", "MPS backend out of memory", "OUT_OF_DEVICE_MEMORY"),
    *("BLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "ALLOCATION_FAILED", "miopenStatusAllocFailed"),
    # cuDNN's, if no algorithm's workspace fits: accelerate takes them for the same
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
        return "\n".join([*error.notes, *first_lines(error.problems)]), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", EXIT_INTERRUPTED
    if is_out_of_memory(error):
        return "memory ran out; lower training.micro_batch_size or data.max_length", ResourceError.exit_code
    if isinstance(error, OSError):
        named = f"{error.filename}: " if error.filename is not None else ""
        if error.errno in _NO_SPACE:
            return f"{named}no space left; free some, or choose another place", ResourceError.exit_code
        if named:
            return f"{named}{error.strerror}; check the path and its permissions", InputError.exit_code
    words = " ".join(str(error).split())[:300]
    what = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return f"this is a bug in tunekit: {what}; run `tunekit --debug ...` for the traceback", EXIT_FAULT
