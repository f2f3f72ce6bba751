"""Collects the problems of a file's rows, so that one error shows up to twenty different problems."""

from dataclasses import dataclass, field, replace

from tunekit.errors import DataError, Problem, TunekitError

MOST_SHOWN = 20
MOST_LINES = 5


@dataclass
class Problems:
    """The problems that were found in one pass over a file."""

    most: int = MOST_SHOWN  # maximum number of different problems to show
    shown: list[Problem] = field(default_factory=list)
    count: int = 0
    others: dict[Problem, list[int]] = field(default_factory=dict)  # problem -> further lines with the same problem

    def add(self, file: str, line: int, what: str, how: str = "", key: str | None = None) -> None:
        """Add one problem. `what`: the fault. `how`: the remedy."""
        problem = Problem(what, how, file, line, key)
        same = next((known for known in self.shown if replace(known, line=line) == problem), None)
        if same is not None:
            self.others.setdefault(same, []).append(line)
            return
        self.count += 1
        if len(self.shown) < self.most:
            self.shown.append(problem)

    def add_error(self, file: str, line: int, error: TunekitError) -> None:
        """Add the problems of an error, with the file and line where it happened."""
        for problem in error.problems:
            self.add(file, line, problem.what, problem.how, problem.key)

    def raise_if_any(self) -> None:
        """Raises: DataError with the collected problems, sorted by line, if there are any."""
        if not self.shown:
            return
        in_order = sorted(self.shown, key=lambda problem: problem.line or 0)
        problems = [_counted(problem, self.others.get(problem, [])) for problem in in_order]
        if self.count > len(problems):
            problems.append(Problem(f"and {self.count - len(problems)} more problems", file=problems[-1].file))
        raise DataError.of(problems)


def _counted(problem: Problem, others: list[int]) -> Problem:
    """The problem, with the number of other rows that have the same problem, and the first lines of these rows."""
    if not others:
        return problem
    lines = ", ".join(map(str, others[:MOST_LINES])) + (", ..." if len(others) > MOST_LINES else "")
    return replace(problem, what=f"{problem.what} ({len(others)} more: line {lines})")
