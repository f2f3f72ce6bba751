"""Parts of a composite model: the towers and projectors around its language model. Text rows do not need them, so that
they are on the meta device and belong to no list of modules."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import Tensor, nn

from tunekit.contracts import Modules
from tunekit.errors import ModelError, listed
from tunekit.model.pretrained import config_of

# Modules inside the decoder that only pictures and sounds use, by model type.
INSIDE_DECODER = {"phi4_multimodal": ("embed_tokens_extend",)}
# Parts that the model calls with every row, and that only replace the embeddings of placeholders.
EMBED_PLACEHOLDERS = ("embed_tokens_extend", "embed_vision", "embed_audio")


@cache
def composite_classes() -> frozenset[str]:
    """The names of transformers' classes that write text and also read images or audio, as config.json names them."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as NAMES

    return frozenset(NAMES.values())


def is_composite(net: nn.Module) -> bool:
    """Whether the net is a language model with parts that read images or audio."""
    return type(net).__name__ in composite_classes()


class UnloadedPart(nn.Module):
    """Stands for a part of a composite model that is not loaded. `part`: its modules on the meta device. They are no
    children of this module, so that they take no memory and are neither moved, counted, adapted nor quantized."""

    part: nn.Module

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "part", part.to("meta"))

    def forward(self, *_: object, **__: object) -> Tensor:
        raise ModelError(f"the rows need {type(self.part).__name__}, which is not loaded", "use rows of text alone")


class UnloadedEmbedding(UnloadedPart):
    """Stands for a part that replaces the embeddings of placeholders, of which rows of text have none."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **features: object
    ) -> Tensor:
        if any(feature is not None for feature in features.values()):
            return super().forward()
        return input_ids.new_zeros(()) if inputs_embeds is None else inputs_embeds  # (), or (B, T, D)

    def __getattr__(self, name: str) -> Any:
        """Numbers of the part, such as its first token id."""
        values = vars(object.__getattribute__(self, "part"))
        return values[name] if name in values else super().__getattr__(name)


def leave_out(net: nn.Module, decoder: str, head: str | None) -> None:
    """Replace every module of a composite model that is neither in its decoder nor in its head by an UnloadedPart."""
    for name in outer_parts(net, decoder, head):
        if next(net.get_submodule(name).parameters(), None) is not None:
            kind = UnloadedEmbedding if name.endswith(EMBED_PLACEHOLDERS) else UnloadedPart
            net.set_submodule(name, kind(net.get_submodule(name)))


def outer_parts(net: nn.Module, decoder: str, head: str | None) -> list[str]:
    """The names of a composite model's modules that are neither in its decoder nor in its head."""
    inside = [f"{decoder}.{name}" for name in INSIDE_DECODER.get(config_of(net).model_type, ())]
    return [*_outside(net, "", [decoder, *([head] if head else [])]), *inside]


def _outside(module: nn.Module, prefix: str, language: list[str]) -> Iterator[str]:
    """Yields the names of the largest modules that neither contain one of the modules `language` nor are inside one."""
    for child_name, child in module.named_children():
        name = f"{prefix}{child_name}"
        if name in language:
            continue
        if any(inner.startswith(f"{name}.") for inner in language):
            yield from _outside(child, f"{name}.", language)
        else:
            yield name


def unloaded_parts(net: nn.Module) -> dict[str, nn.Module]:
    """The parts that are not loaded, by name, each on the meta device. Empty for a net that is not composite."""
    return {name: module.part for name, module in net.named_modules() if isinstance(module, UnloadedPart)}


def part_notes(net: nn.Module) -> list[str]:
    """A note on what a composite model trains, and what it leaves alone."""
    counts = {
        name: sum(parameter.numel() for parameter in part.parameters()) for name, part in unloaded_parts(net).items()
    }
    if not counts:
        return []
    named = listed([f"{name} ({count:,} parameters)" for name, count in counts.items()], 4)
    return [f"{type(net).__name__}: only its language model is trained; left alone and not loaded: {named}"]


def unloaded_modules(net: nn.Module) -> Modules:
    """All modules inside the parts that are not loaded, by name."""
    return {
        f"{outer}.{name}" if name else outer: module
        for outer, part in unloaded_parts(net).items()
        for name, module in part.named_modules()
    }
