"""Refuses combinations of valid keys that tunekit cannot run. The messages name the keys: no key is silently
ignored."""

from collections.abc import Iterator

from tunekit.errors import Problem
from tunekit.recipe.bases.section import StartSettings
from tunekit.recipe.recipe import Recipe

HEAD_RATE = "training.head_learning_rate"
SHARDING, HOW = "memory.sharding", "write sharding: off, or auto"


def refuse_unsupported(recipe: Recipe) -> list[Problem]:
    """One problem for every option that this recipe cannot combine with its other options."""
    beside = _problems_of_a_trained_base(recipe)
    problems = [
        *_family_problems(recipe),
        *_head_problems(recipe),
        *beside,
        *_activation_problems(recipe),
        *_start_problems(recipe),
    ]
    return [*problems, *_kept_problems(recipe), *_sharding_problems(recipe)]


def _family_problems(recipe: Recipe) -> Iterator[Problem]:
    """A problem if the objective cannot train a model of the base's family."""
    trained = recipe.objective.family
    if recipe.model.family not in ("auto", trained):
        what = f"{recipe.objective.method} trains models of the family {trained}, and model.family is "
        how = f"write {trained} or auto, or another objective"
        yield Problem(f"{what}{recipe.model.family}", how, key="model.family")


def _head_problems(recipe: Recipe) -> Iterator[Problem]:
    """A problem if the recipe sets a learning rate for a head, but the objective trains none."""
    rate = recipe.training.head_learning_rate
    if rate is not None and not recipe.objective.has_head:
        what = f"is {rate:g}, but {recipe.objective.method} trains no head"
        yield Problem(what, "remove it; training.learning_rate is the rate of the adapter", key=HEAD_RATE)


def _problems_of_a_trained_base(recipe: Recipe) -> Iterator[Problem]:
    """Problems of options that do not work if the base's own weights are trained."""
    adapter, quantization = recipe.adapter, recipe.model.quantization
    if not adapter.trains_base:
        return
    what = f"{adapter.method} trains the base's own weights"
    ratio, streams = recipe.training.loraplus_ratio, recipe.memory.streaming in ("host", "disk")
    dense = "write quantization: none, or train an adapter, such as lora"
    base = "name the model in model.name_or_path"
    checks = (
        ("model.quantization", quantization != "none", f", and {quantization} weights have no gradient", dense),
        ("memory.streaming", streams, ", and a streamed base is read-only", "write off, or train an adapter"),
        ("memory.streamed_head", recipe.memory.streamed_head, ", and a streamed head is read-only", "write false"),
        ("training.loraplus_ratio", ratio is not None, ": there are no LoRA matrices A and B", "remove it"),
        ("adapter.init_from", adapter.init_from is not None, ": there is no adapter to continue", base),
    )
    for key, is_wrong, why, how in checks:
        if is_wrong:
            yield Problem(f"{what}{why}", how, key=key)


def _activation_problems(recipe: Recipe) -> Iterator[Problem]:
    """Problems of settings for the memory of activations that have no effect here, or would change results."""
    memory = recipe.memory
    recomputed = memory.gradient_checkpointing
    if memory.activation_offload is True and recomputed is not True and recomputed in (0, 1):  # False is 0
        what = "true offloads the inputs of all recomputed layers except the last, but at most one layer is recomputed"
        how = "write auto, or memory.gradient_checkpointing: auto"
        yield Problem(what, how, key="memory.activation_offload")
    if memory.mlp_tile_tokens is not None and recipe.model.quantization == "int8":
        what = "int8 (LLM.int8) rounds all tokens of a call together, so dividing them into tiles would change results"
        how = "remove it, or write model.quantization: int8_weight_only"
        yield Problem(what, how, key="memory.mlp_tile_tokens")


def unsharded_reason(recipe: Recipe) -> str | None:
    """The reason why this recipe's base cannot be divided among ranks; None if the recipe allows it."""
    adapter, memory = recipe.adapter, recipe.memory
    start = adapter.initialisation
    if adapter.trains_base:
        return f"{adapter.method} trains the base's own weights"
    if start is not None and (start.moves_weights or adapter.calibration is not None):
        return f"adapter.start: {start.method} needs the whole base on one device"
    if adapter.needs_base_first:
        return f"the initial values of {adapter.method} need the whole base on one device"
    if memory.streaming in ("host", "disk"):
        return f"memory.streaming: {memory.streaming} stores it on the host"
    if memory.streamed_head:
        return "memory.streamed_head stores a part of it on the host"
    return None


def _sharding_problems(recipe: Recipe) -> Iterator[Problem]:
    """A problem if the recipe divides the base among ranks, but cannot."""
    reason = unsharded_reason(recipe)
    if recipe.memory.sharding == "full" and reason is not None:
        yield Problem(f"the base cannot be sharded: {reason}", HOW, key=SHARDING)


def _kept_problems(recipe: Recipe) -> Iterator[Problem]:
    """A problem if the recipe keeps the base's quantized blocks, but the base is not a .gguf file."""
    name = recipe.model.name_or_path
    if recipe.model.quantization == "kept" and not name.lower().endswith(".gguf"):
        what = f"kept uses the quantized blocks of a .gguf file, but the base is {name}"
        how = "name a .gguf file, or write nf4"
        yield Problem(what, how, key="model.quantization")


def _start_problems(recipe: Recipe) -> Iterator[Problem]:
    """Problems of a LoRA initialisation (`start`) that does not fit the base's quantization."""
    start, quantization = getattr(recipe.adapter, "start", None), recipe.model.quantization
    if not isinstance(start, StartSettings):
        return
    if start.moves_weights and quantization != "none":
        what = (
            f"{start.method} moves a part of each weight into the adapter, and the rest of a {quantization} base "
            "would have to be quantized again"
        )
        yield Problem(what, "write start: loftq, or quantization: none", key="adapter.start")
    if start.looks_at == "original" and quantization == "none":
        what = f"{start.method} corrects the errors of quantization, and this base is not quantized"
        yield Problem(what, "write model.quantization: nf4, or another start", key="adapter.start")
    elif start.looks_at == "original" and recipe.model.name_or_path.endswith(".gguf"):
        what = f"{start.method} needs the weights before quantization, and a GGUF file can lack these weights"
        yield Problem(what, "name the safetensors folder of the base, or write another start", key="adapter.start")
