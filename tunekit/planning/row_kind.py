"""The row kind of a recipe, which says how its rows are encoded. It is determined without loading the model."""

from tunekit.contracts import RowKind
from tunekit.data.encoding.sources import encode_options
from tunekit.errors import RecipeError
from tunekit.model.families import make_family
from tunekit.model.storage.source import is_here
from tunekit.objectives.base import make_objective
from tunekit.recipe.recipe import Recipe
from tunekit.targets.labels import start_facts


def row_kind_at_hand(recipe: Recipe) -> RowKind | None:
    """The row kind of the recipe's objective, with its tokenizer or processor and its chat template.

    None if the tokenizer is not downloaded yet.
    Raises: TunekitError if these files cannot be read, or if options of the recipe do not apply to these rows.
    """
    if not is_here(recipe.model):
        return None
    processor = make_family(recipe.objective.family).processor(recipe.model)
    objective = make_objective(recipe.objective, processor, start_facts(recipe), encode_options(recipe.data))
    problems = objective.rows.problems()
    if problems:
        raise RecipeError.of(problems)
    return objective.rows
