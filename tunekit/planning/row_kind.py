"""How the rows of a recipe are encoded, before its model is loaded."""

from tunekit.contracts import RowKind
from tunekit.data.encoding.sources import encode_options
from tunekit.errors import RecipeError
from tunekit.model.families import make_family
from tunekit.model.storage.source import is_here
from tunekit.objectives.base import make_objective
from tunekit.recipe.recipe import Recipe
from tunekit.targets.labels import start_facts


def row_kind_at_hand(recipe: Recipe) -> RowKind | None:
    """The rows of the objective, with the model's tokenizer (or processor) and the chat template; None where they would
    have to be downloaded first.

    Raises: TunekitError where they cannot be read, or where options mean nothing to these rows.
    """
    if not is_here(recipe.model):
        return None
    processor = make_family(recipe.objective.family).processor(recipe.model)
    objective = make_objective(recipe.objective, processor, start_facts(recipe), encode_options(recipe.data))
    problems = objective.rows.problems()
    if problems:
        raise RecipeError.of(problems)
    return objective.rows
