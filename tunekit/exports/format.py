"""Values that export formats read and return, and a list of the formats. Each format is one file of this folder."""

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
    """The options of the export command that only some formats read. `type`: the type of the weights, by the
    format's name for it: Q4_K_M in gguf, int8 in ctranslate2. `merged`: write a merged model even if the format can
    hold the adapter. `imatrix`: quantize with an importance matrix, measured on the run's rows. `push`: upload the
    export."""

    type: str | None = None
    merged: bool = False
    imatrix: bool = False
    push: bool = False

    def given(self) -> list[str]:
        """The names of the options that differ from their defaults."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]


@dataclass(frozen=True)
class Evidence:
    """Inputs of `write` besides the model. `rows(count, tokens)`: returns token ids of at most `count` training
    rows, each cut to `tokens`, and a description of the rows. `run`: the values of the run's files, if there is a
    run. `name`: the name of the output."""

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

    Shapes: `expected` and `base` have one (T, V) float32 tensor for each row. `expected`: from the exported model, with
    its adapter. `base`: from the model without the adapter; only for the export of an adapter alone. `described`: a
    description of the rows and their origin.
    """

    rows: Sequence[Sequence[int]]
    expected: Sequence[Tensor]
    base: Sequence[Tensor] | None
    described: str

    def cut(self, tokens: int) -> "Questions":
        """The same questions with at most the first `tokens` ids of each row."""
        base = None if self.base is None else [each[:tokens] for each in self.base]
        return Questions([row[:tokens] for row in self.rows], [e[:tokens] for e in self.expected], base, self.described)


@dataclass(frozen=True)
class Difference:
    """The differences between a program's log-probabilities and torch's, over `tokens` positions.

    `largest` and `mean`: the largest and the mean absolute difference in nats. `perplexity` and `torch_perplexity`: the
    program's and torch's perplexity on the same tokens. `greedy_differences`: the number of positions
    at which the most probable token differs.
    """

    largest: float
    mean: float
    perplexity: float
    torch_perplexity: float
    greedy_differences: int
    tokens: int


@dataclass(frozen=True)
class Certificate:
    """The comparison of a program's answers with torch's. `parts`: the differences by name, such as base, base +
    adapter, merged or Q4_K_M. `note`: a limit of the comparison, for example that another program was run in place
    of this one. `warning`: how the program's tokens differ from the model's."""

    program: str
    version: str
    rows: str
    parts: Mapping[str, Difference]
    note: str = ""
    warning: str = ""


class Format(Protocol):
    """A module of this folder, which writes one format. `TAKES`: the kinds of targets that it exports.
    `OPTIONS`: the options that it reads. `SUFFIX`: the ending of the file that it writes; empty for a folder.
    `PROGRAM`: the program that certifies the export, by its name in scripts/certify. If `PROGRAM` is empty, `certify`
    is never called."""

    TAKES: frozenset[str]
    OPTIONS: frozenset[str]
    SUFFIX: str
    PROGRAM: str

    def problems(self, exportable: Exportable, options: Options) -> list[Problem]:
        """The reasons why the format cannot hold this export. They are found before anything is written."""

    def write(self, exportable: Exportable, path: Path, evidence: Evidence, options: Options) -> Exported:
        """Write the export to `path`, which does not exist yet."""

    def certify(
        self,
        written: Exported,
        exportable: Exportable,
        program: Program,
        questions: Callable[[], Questions],
        options: Options,
    ) -> Certificate:
        """Run the program, and compare its answers with torch's. `questions()` computes the rows and torch's
        answers."""


@cache
def known_formats() -> tuple[str, ...]:
    """The sorted names of all formats. Each file of this folder that defines TAKES is a format. A dash in a name is an
    underscore in the file's name."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return tuple(file.stem.replace("_", "-") for file in files if "\nTAKES" in file.read_text("utf-8"))


def load_format(name: str) -> Format:
    """The module of a format. Raises: InputError for an unknown name."""
    if name not in known_formats():
        raise InputError(f"{name} is unknown", f"choose {', '.join(known_formats())}", key="--to")
    return cast(Format, import_module(f"tunekit.exports.{name.replace('-', '_')}"))
