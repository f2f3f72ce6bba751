"""What the recipe's grammar knows but this version cannot do: refused by name, never read and ignored.

Comes in: a valid Recipe.  Goes out: one Problem per option, with its key.  Next: validate and plan show them.
"""

from __future__ import annotations

from tunekit.errors import Problem
from tunekit.recipe.recipe import Recipe


def refuse_unsupported(recipe: Recipe) -> list[Problem]:
    """Every written option that could not be obeyed."""
    problems: list[Problem] = []

    def refuse(key: str, what: str, how: str) -> None:
        problems.append(Problem(what, how, key=key))

    if recipe.model.family not in ("auto", "causal"):
        what = f"the family {recipe.model.family} cannot be trained; causal language models can"
        refuse("model.family", what, "write causal or auto")
    if recipe.memory.streaming in ("host", "disk"):
        what = f"base weights cannot wait on {recipe.memory.streaming}; the model stays on its device"
        refuse("memory.streaming", what, "write off or auto")
    if recipe.memory.budget is not None:
        what = "a memory budget cannot be kept; `tunekit plan` predicts the peak"
        refuse("memory.budget", what, "remove it, or lower micro_batch_size or data.max_length")
    return problems
