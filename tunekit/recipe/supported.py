"""What the recipe's grammar knows but this version cannot do: refused by name, never read and ignored.

Comes in: a valid Recipe.  Goes out: one Problem per option, with its key.
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

    trained = recipe.objective.family
    if recipe.model.family not in ("auto", trained):
        what = f"{recipe.objective.method} trains models of the family {trained}, and model.family is "
        refuse("model.family", f"{what}{recipe.model.family}", f"write {trained} or auto, or another objective")
    _refuse_beside_the_base(recipe, refuse)
    _refuse_activations(recipe, refuse)
    _refuse_start(recipe, refuse)
    return problems


def _refuse_beside_the_base(recipe: Recipe, refuse: Callable[[str, str, str], None]) -> None:
    """What cannot be had where the base's own weights are trained."""
    adapter, quantization = recipe.adapter, recipe.model.quantization
    if not adapter.trains_base:
        return
    what = f"{adapter.method} trains the base's own weights"
    if quantization != "none":
        how = "write quantization: none, or train an adapter of it, lora for one"
        refuse("model.quantization", f"{what}, and packed ones ({quantization}) have no gradient", how)
    if recipe.memory.streaming in ("host", "disk"):
        refuse("memory.streaming", f"{what}, which a streamed base only reads", "write off, or train an adapter")
    if recipe.training.loraplus_ratio is not None:
        refuse("training.loraplus_ratio", f"{what}: there is no B that could be faster than A", "remove it")
    if adapter.init_from is not None:
        refuse("adapter.init_from", f"{what}: there is no adapter to continue", "name the model in model.name_or_path")


def _refuse_activations(recipe: Recipe, refuse: Callable[[str, str, str], None]) -> None:
    """What may be traded for activations, where there is nothing to trade or it would change results."""
    memory = recipe.memory
    recomputed = memory.gradient_checkpointing
    if memory.activation_offload is True and recomputed is not True and recomputed in (0, 1):  # False is 0
        what = "the inputs of recomputed layers wait on the host, the last one's excepted, and that leaves none"
        refuse("memory.activation_offload", what, "write auto, or memory.gradient_checkpointing: auto")
    if memory.mlp_tile_tokens is not None and recipe.model.quantization == "int8":
        what = "LLM.int8 rounds over all tokens that it is given, so that tiles would change what it computes"
        refuse("memory.mlp_tile_tokens", what, "remove it, or write model.quantization: int8_weight_only")


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
