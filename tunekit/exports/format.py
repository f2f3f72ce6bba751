"""The values that every export format reads and returns, and the formats by name: one file of this folder each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from torch import Tensor

from tunekit.artifacts.report.values import RunValues
from tunekit.errors import InputError, Problem
from tunekit.exports.programs.program import Program
from tunekit.targets.exportable import Exportable


@dataclass(frozen=True)
class Options:
    """The options of the command that only some formats read. `type`: the type of the weights, in the words
    of the format: Q4_K_M in gguf, int8 in ctranslate2. `merged`: write a merged model even if the format can hold the
    adapter. `imatrix`: weigh the quantization error by the run's own rows. `push`: upload the export."""

    type: str | None = None
    merged: bool = False
    imatrix: bool = False
    push: bool = False

    def given(self) -> list[str]:
        """The names of the options that differ from their defaults."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]


@dataclass(frozen=True)
class Evidence:
    """What a format may want besides the model. `rows(count, tokens)`: token ids of at most `count` training rows, each
    cut to `tokens`, and a description of them. No certificate measures on training rows. `run`: the values of the run's
    files, if there is a run. `name`: the name of the output."""

    rows: Callable[[int, int], tuple[list[list[int]], str]]
    run: RunValues | None
    name: str


@dataclass(frozen=True)
class Exported:
    """The result of an export. `what`: "adapter", "merged" or "model". `notes`: lines for the user, such as the command
    that runs the result."""

    path: Path
    what: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Questions:
    """Rows of token ids, and torch's log-probabilities of the next token in float32.

    Shapes: each of `expected` and `base` has one (T, V) float32 tensor for each row. `expected`: of the exported model,
    with its adapter. `base`: without the adapter; only for the export of an adapter alone. `described`: where the rows
    are from.
    """

    rows: Sequence[Sequence[int]]
    expected: Sequence[Tensor]
    base: Sequence[Tensor] | None
    described: str

    def cut(self, tokens: int) -> "Questions":
        """At most the first `tokens` of each row."""
        base = None if self.base is None else [each[:tokens] for each in self.base]
        return Questions([row[:tokens] for row in self.rows], [e[:tokens] for e in self.expected], base, self.described)


@dataclass(frozen=True)
class Difference:
    """The log-probabilities of a program compared with torch's, over `tokens` positions.

    `largest` and `mean`: absolute differences in nats. `perplexity` and `torch_perplexity`: on the same tokens.
    `greedy_differences`: the positions at which the most probable token differs.
    """

    largest: float
    mean: float
    perplexity: float
    torch_perplexity: float
    greedy_differences: int
    tokens: int


@dataclass(frozen=True)
class Certificate:
    """What a program computed from an export. `parts`: such as base, adapter, merged or Q4_K_M. `note`: what the
    reader must know to judge the figures, such as the arithmetic that stands for a program that cannot be run.
    `warning`: what the program does in another way than the model."""

    program: str
    version: str
    rows: str
    parts: Mapping[str, Difference]
    note: str = ""
    warning: str = ""


class Format(Protocol):
    """A module of this folder. `TAKES`: the kinds of exportables that it takes. `OPTIONS`: the options that it reads.
    `SUFFIX`: the ending of the file that it writes; empty for a folder. `PROGRAM`: the program that certifies the
    export, by the name that scripts/certify knows; empty if there is none, and then `certify` is never called."""

    TAKES: frozenset[str]
    OPTIONS: frozenset[str]
    SUFFIX: str
    PROGRAM: str

    def problems(self, exportable: Exportable, options: Options) -> list[Problem]:
        """Everything that the format cannot hold, before anything is written."""

    def write(self, exportable: Exportable, path: Path, evidence: Evidence, options: Options) -> Exported:
        """Write the export at the new path `path`."""

    def certify(
        self,
        written: Exported,
        exportable: Exportable,
        program: Program,
        questions: Callable[[], Questions],
        options: Options,
    ) -> Certificate:
        """Ask the program. `questions` computes the questions."""


@cache
def known_formats() -> tuple[str, ...]:
    """Every format: the files of this folder that state TAKES, sorted."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return tuple(file.stem for file in files if "\nTAKES" in file.read_text("utf-8"))


def load_format(name: str) -> Format:
    """The module of a format. Raises: InputError for an unknown name."""
    if name not in known_formats():
        raise InputError(f"--to {name} is unknown", f"choose {', '.join(known_formats())}", key="--to")
    return cast(Format, import_module(f"tunekit.exports.{name}"))
