"""Collecting what is wrong with a file's rows: the first twenty in full, the rest counted.

A problem with a key has its cause in the recipe and not in the row: it is said once, with its other rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tunekit.errors import DataError, Problem, TunekitError

MOST_SHOWN = 20
MOST_LINES = 5


@dataclass
class Problems:
    """Problems of one reading of the data."""

    shown: list[Problem] = field(default_factory=list)
    count: int = 0
    others: dict[Problem, list[int]] = field(default_factory=dict)  # of those said once: lines beyond the first

    def add(self, file: str, line: int, what: str, how: str = "") -> None:
        """One problem at a place."""
        self.count += 1
        if len(self.shown) < MOST_SHOWN:
            self.shown.append(Problem(what, how, file, line))

    def add_error(self, file: str, line: int, error: TunekitError) -> None:
        """The problems of an error that does not know where it happened."""
        for problem in error.problems:
            if problem.key is None:
                self.add(file, line, problem.what, problem.how)
            else:
                self._add_once(replace(problem, file=file, line=line), line)

    def _add_once(self, problem: Problem, line: int) -> None:
        for known in self.shown:
            if replace(known, line=line) == problem:
                self.others.setdefault(known, []).append(line)
                return
        self.count += 1
        self.shown.append(problem)

    def raise_if_any(self) -> None:
        """One DataError with every problem shown, in the order found."""
        if not self.shown:
            return
        problems = [_counted(problem, self.others.get(problem, [])) for problem in self.shown]
        if self.count > len(problems):
            problems.append(Problem(f"and {self.count - len(problems)} more problems", file=problems[-1].file))
        raise DataError.of(problems)


def _counted(problem: Problem, others: list[int]) -> Problem:
    """The problem of one row, with how many other rows have it and where the first of them stand."""
    if not others:
        return problem
    lines = ", ".join(map(str, others[:MOST_LINES])) + (", ..." if len(others) > MOST_LINES else "")
    return replace(problem, what=f"{problem.what} ({len(others)} more: line {lines})")
