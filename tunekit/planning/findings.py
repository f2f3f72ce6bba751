"""What is wrong with a run, collected from every part before it begins, so that all is shown at once."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from tunekit.errors import Problem, RecipeError, ResourceError, TunekitError
from tunekit.recipe.load import LoadedRecipe
from tunekit.records import Plan, Refusal

Made = TypeVar("Made")


class Findings:
    """Problems of every part, collected so that all are shown at once."""

    def __init__(self, loaded: LoadedRecipe) -> None:
        self._loaded = loaded
        self.problems: list[Problem] = []
        self._lacks: list[Problem] = []  # of them, those of memory
        self._errors: list[TunekitError] = []

    def add(self, problems: Iterable[Problem]) -> None:
        """Note problems; one without a file is the recipe's."""
        self.problems += [self._loaded.locate(problem) if problem.file is None else problem for problem in problems]

    def lack(self, problem: Problem) -> None:
        """Note that there is too little memory: nothing in the recipe is wrong by itself."""
        self.add([problem])
        self._lacks.append(self.problems[-1])

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
        return [self._refusal(problem) for problem in self.problems]

    def _refusal(self, problem: Problem) -> Refusal:
        message = f"{problem.what}; {problem.how}" if problem.how else problem.what
        kind = ResourceError if problem in self._lacks else RecipeError
        return Refusal(problem.key or "", problem.line, message, problem.file, kind.exit_code)


def raise_refusals(plan: Plan) -> None:
    """Raise what the plan refuses, if it refuses anything.

    Raises: RecipeError with every refusal, each with its file and line; ResourceError if all are of memory.
    """
    if not plan.refusals:
        return
    kinds = {refusal.exit_code for refusal in plan.refusals}
    kind: type[TunekitError] = ResourceError if kinds == {ResourceError.exit_code} else RecipeError
    raise kind.of([Problem(refusal.message, "", refusal.file, refusal.line, refusal.key) for refusal in plan.refusals])
