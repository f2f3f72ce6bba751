"""Collecting what is wrong with a file's rows: the first twenty in full, the rest counted."""

from __future__ import annotations

from dataclasses import dataclass, field

from tunekit.errors import DataError, Problem, TunekitError

MOST_SHOWN = 20


@dataclass
class Problems:
    """Problems of one reading of the data."""

    shown: list[Problem] = field(default_factory=list)
    count: int = 0

    def add(self, file: str, line: int, what: str, how: str = "") -> None:
        """One problem at a place."""
        self.count += 1
        if len(self.shown) < MOST_SHOWN:
            self.shown.append(Problem(what, how, file, line))

    def add_error(self, file: str, line: int, error: TunekitError) -> None:
        """The problems of an error that does not know where it happened."""
        for problem in error.problems:
            self.add(file, line, problem.what, problem.how)

    def raise_if_any(self) -> None:
        """One DataError with every problem shown, in the order found."""
        if not self.shown:
            return
        problems = list(self.shown)
        if self.count > len(problems):
            problems.append(Problem(f"and {self.count - len(problems)} more problems", file=problems[-1].file))
        raise DataError.of(problems)
