"""The checks before a run starts, listed one per line; plan.json has their problems in this order. They are written in
refusals.py and near what they check.

Checks elsewhere: of the recipe's keys in recipe/load.py (`make_recipe`); of templates, companions and everything that
cannot be read in prepare.py; of memory in memory.py and tiers.py.
"""

from collections.abc import Iterator

import torch

from tunekit.adapters.method import load_method
from tunekit.errors import Problem
from tunekit.planning import refusals
from tunekit.planning.initialisation import continued_problems, initialisation_problems
from tunekit.planning.kernels import kernel_problems
from tunekit.planning.prepared import Prepared
from tunekit.recipe.reading.supported import refuse_unsupported
from tunekit.recipe.recipe import Recipe
from tunekit.records import ExecutionSettings
from tunekit.tuned.fit import row_problems


def recipe_checks(recipe: Recipe, device: torch.device, *, check_folder: bool, resumed: bool) -> Iterator[Problem]:
    """Checks that read neither the model nor the data."""
    yield from refuse_unsupported(recipe)
    yield from refusals.library_problems(recipe)
    yield from refusals.device_problems(recipe, device)
    if check_folder:
        yield from refusals.folder_problems(recipe)
    if not resumed:  # a run or a sweep of an older version can be resumed
        yield from refusals.step_problems(recipe)


def run_checks(prepared: Prepared, *, resumed: bool) -> Iterator[Problem]:
    """Checks of model, data and adapter together."""
    adapter, objective = prepared.recipe.adapter, prepared.rows.objective
    base, context = prepared.base, prepared.context
    yield from row_problems(base, context.processor, objective.rows, context.rows, context.virtual_tokens)
    yield from initialisation_problems(adapter, base, context.targets)
    yield from refusals.part_problems(prepared.recipe, base)
    yield from refusals.image_problems(prepared.recipe, base, prepared.rows)
    yield from refusals.fixed_rows_problems(prepared.recipe, objective.rows)
    if not resumed:  # the state of a resumed run is in its checkpoint
        yield from continued_problems(adapter, base, context.targets)


def execution_checks(prepared: Prepared, execution: ExecutionSettings) -> Iterator[Problem]:
    """Checks of the settings that the recipe or an earlier decision fixes."""
    adapter, device = prepared.recipe.adapter, prepared.resources.device
    method = load_method(adapter.method)
    for conflict in method.run_conflicts(adapter, prepared.steps.count):
        yield Problem(conflict.what, conflict.how, key=f"adapter.{conflict.key}")
    yield from kernel_problems(execution.kernels, device)
