"""Parts of a composite model: the towers and projectors around its language model. They belong to no list of modules.
Text rows do not need them, so that they are on the meta device unless rows have images."""

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


class OuterPart(nn.Module):
    """Stands for a part of a composite model outside its language model. `part`: its modules, which are no children of
    this module, so that they are neither counted, adapted, quantized nor trained. `loaded`: whether rows with images
    need it; otherwise it is on the meta device."""

    part: nn.Module

    def __init__(self, part: nn.Module, *, loaded: bool) -> None:
        super().__init__()
        object.__setattr__(self, "part", part.eval() if loaded else part.to("meta"))
        self.loaded = loaded

    def forward(self, *arguments: object, **keywords: object) -> object:
        if self.loaded:
            return self.part(*arguments, **keywords)
        raise ModelError(f"the rows need {type(self.part).__name__}, which is not loaded", "use rows of text alone")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not self.__dict__.get("loaded"):
                raise
            return getattr(self.part, name)


class UnloadedEmbedding(OuterPart):
    """Stands for a part that replaces the embeddings of placeholders, of which rows of text have none."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **features: object
    ) -> object:
        if any(feature is not None for feature in features.values()):
            return super().forward()
        return input_ids.new_zeros(()) if inputs_embeds is None else inputs_embeds  # (), or (B, T, D)

    def __getattr__(self, name: str) -> Any:
        """Numbers of the part, such as its first token id."""
        values = vars(object.__getattribute__(self, "part"))
        return values[name] if name in values else super().__getattr__(name)


def set_apart(net: nn.Module, decoder: str, head: str | None, *, loaded: bool) -> None:
    """Replace every module of a composite model that is neither in its decoder nor in its head by an OuterPart."""
    for name in outer_parts(net, decoder, head):
        if next(net.get_submodule(name).parameters(), None) is not None:
            kind = UnloadedEmbedding if name.endswith(EMBED_PLACEHOLDERS) and not loaded else OuterPart
            net.set_submodule(name, kind(net.get_submodule(name), loaded=loaded))
    vars(net)["stays"] = loaded  # the parts stay on the device


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


def parts_apart(net: nn.Module, *, loaded: bool | None = None) -> dict[str, nn.Module]:
    """The parts outside the language model, by name. Empty for a net that is not composite. `loaded`: only those that
    are loaded, or only those on the meta device."""
    parts = {name: module for name, module in net.named_modules() if isinstance(module, OuterPart)}
    return {name: module.part for name, module in parts.items() if loaded in (None, module.loaded)}


def part_notes(net: nn.Module) -> list[str]:
    """A note on what a composite model trains, and what it leaves alone."""
    notes = list[str]()
    for loaded, state in (
        (True, "frozen, and computed once for each image of a step"),
        (False, "left alone and not loaded"),
    ):
        counts = {
            name: sum(parameter.numel() for parameter in part.parameters())
            for name, part in parts_apart(net, loaded=loaded).items()
        }
        if counts:
            named = listed([f"{name} ({count:,} parameters)" for name, count in counts.items()], 4)
            notes.append(f"{type(net).__name__}: only its language model is trained; {state}: {named}")
    return notes


def modules_apart(net: nn.Module) -> Modules:
    """All modules inside the parts outside the language model, by name."""
    return {
        f"{outer}.{name}" if name else outer: module
        for outer, part in parts_apart(net).items()
        for name, module in part.named_modules()
    }
