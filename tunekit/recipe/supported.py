"""What the recipe's grammar knows but this version cannot do: refused by name, never read and ignored.

Comes in: a valid Recipe.  Goes out: one Problem per option, with its key.  Next: validate and plan show them.
"""

from __future__ import annotations

from collections.abc import Callable

from tunekit.errors import Problem
from tunekit.recipe.recipe import Recipe
from tunekit.recipe.section import StartSettings


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
    _refuse_start(recipe, refuse)
    return problems


def _refuse_start(recipe: Recipe, refuse: Callable[[str, str, str], None]) -> None:
    """Starts of the LoRA family that do not fit how the base is stored."""
    start, quantization = getattr(recipe.adapter, "start", None), recipe.model.quantization
    if not isinstance(start, StartSettings):
        return
    if start.moves_weights and quantization != "none":
        what = (
            f"{start.method} moves a part of each weight into the adapter, and what is left of a {quantization} base "
        )
        refuse("adapter.start", f"{what}would have to be quantized anew", "write start: loftq, or quantization: none")
    if start.looks_at != "original":
        return
    if quantization == "none":
        what = f"{start.method} makes up for what quantization took, and this base is not quantized"
        refuse("adapter.start", what, "write model.quantization: nf4, or another start")
    elif recipe.model.name_or_path.endswith(".gguf"):
        what = f"{start.method} needs the weights from before quantization, and a GGUF file need not hold them"
        refuse("adapter.start", what, "give the safetensors folder of the base, or another start")
