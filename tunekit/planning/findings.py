"""Collects all problems of a run before it starts, so that the user sees all of them at once."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tunekit.errors import Problem, RecipeError, ResourceError, TunekitError
from tunekit.recipe.load import LoadedRecipe
from tunekit.records import Plan, Refusal

Made = TypeVar("Made")


class Findings:
    """The problems of a run. `prepare` adds all problems here."""

    def __init__(self, loaded: LoadedRecipe) -> None:
        self._loaded = loaded
        self.problems: list[Problem] = []
        self._errors: list[TunekitError] = []

    def add(self, problems: Iterable[Problem]) -> None:
        """Add problems."""
        self.problems += located(self._loaded, problems)

    def attempt(self, work: Callable[..., Made], *values: object, **named: object) -> Made | None:
        """Call `work` with these values and return its result. If it raises an error, add the error's problems and
        return None. If a value is None, because an earlier attempt failed, return None at once."""
        if any(value is None for value in values):
            return None
        try:
            return work(*values, **named)
        except TunekitError as error:
            self._errors.append(error)
            self.add(error.problems)
            return None

    def error(self) -> TunekitError:
        """One error with all problems. If all raised errors have the same class, it has this class too; otherwise it is
        a RecipeError."""
        kinds = {type(error) for error in self._errors}
        kind = kinds.pop() if len(kinds) == 1 else RecipeError
        return kind.of(self.problems)


def located(loaded: LoadedRecipe, problems: Iterable[Problem]) -> list[Problem]:
    """The problems. One without a file gets the recipe's file and line."""
    return [loaded.locate(problem) if problem.file is None else problem for problem in problems]


def refusals_of(loaded: LoadedRecipe, problems: Iterable[Problem], kind: type[TunekitError]) -> Iterator[Refusal]:
    """The problems as values for `plan.refusals`. `kind`: the error whose exit code they have; it is ResourceError if
    memory is too small."""
    for problem in located(loaded, problems):
        message = f"{problem.what}; {problem.how}" if problem.how else problem.what
        yield Refusal(problem.key or "", problem.line, message, problem.file, kind.exit_code)


def raise_refusals(plan: Plan) -> None:
    """Raises: RecipeError with all refusals of the plan; ResourceError if all of them are about memory. Does nothing if
    the plan has no refusals."""
    if not plan.refusals:
        return
    kinds = {refusal.exit_code for refusal in plan.refusals}
    kind: type[TunekitError] = ResourceError if kinds == {ResourceError.exit_code} else RecipeError
    raise kind.of([Problem(refusal.message, "", refusal.file, refusal.line, refusal.key) for refusal in plan.refusals])
