"""What is wrong with a run, collected from every part before it begins, so that all is told at once.

Comes in: problems and errors of the parts.  Goes out: problems with file and line, Refusals, one error.  Next: plan.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from tunekit.decisions import Plan, Refusal
from tunekit.errors import Problem, RecipeError, TunekitError
from tunekit.recipe.load import LoadedRecipe

Made = TypeVar("Made")


class Findings:
    """Problems of every part, collected so that all are shown at once."""

    def __init__(self, loaded: LoadedRecipe) -> None:
        self._loaded = loaded
        self.problems: list[Problem] = []
        self._errors: list[TunekitError] = []

    def add(self, problems: Sequence[Problem]) -> None:
        """Note problems; one without a file is the recipe's."""
        self.problems += [self._loaded.locate(problem) if problem.file is None else problem for problem in problems]

    def attempt(self, work: Callable[[], Made]) -> Made | None:
        """The result of `work`, or None and its problems noted."""
        try:
            return work()
        except TunekitError as error:
            self._errors.append(error)
            self.add(error.problems)
            return None

    def error(self) -> TunekitError:
        """All problems as one error, of the kind that all of them are."""
        kinds = {type(error) for error in self._errors}
        kind = kinds.pop() if len(kinds) == 1 else RecipeError
        return kind.of(self.problems)

    def refusals(self) -> list[Refusal]:
        """The problems as a plan holds them."""
        return [_refusal(problem) for problem in self.problems]


def _refusal(problem: Problem) -> Refusal:
    message = f"{problem.what}; {problem.how}" if problem.how else problem.what
    return Refusal(problem.key or "", problem.line, message, problem.file)


def raise_refusals(plan: Plan) -> None:
    """Raises: RecipeError with every refusal of the plan, each at its place."""
    if plan.refusals:
        raise RecipeError.of(
            [Problem(refusal.message, "", refusal.file, refusal.line, refusal.key) for refusal in plan.refusals]
        )
