"""The class of a loaded base."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from tunekit.contracts import LoadedBase
from tunekit.model.families import Family
from tunekit.model.storage.sidecar import Sidecar
from tunekit.records import ModelFacts, TextFacts

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig


class SharedSlots(Protocol):
    """The places on the device for the layers of a streamed base (memory.slots.LayerSlots)."""

    def holding(self, layer: int, then: int | None = None) -> AbstractContextManager[None]:
        """A context manager: inside the block, `layer` is on the device."""


@dataclass
class LoadedModel:
    """A base model, frozen and in eval mode. `fingerprint` is None for a model on the meta device."""

    net: nn.Module
    config: PreTrainedConfig
    family: Family
    dtype: torch.dtype
    device: torch.device
    fingerprint: str | None
    facts: ModelFacts
    text: TextFacts | None  # None if the model neither reads nor writes text
    generation_config: GenerationConfig | None
    notes: list[str] = field(default_factory=list)
    new_modules: tuple[str, ...] = ()  # modules of the head that are initialised at random, because the files lack them
    sidecar: Sidecar | None = None  # on a CPU: the file that contains the mapped weights
    # for a streamed or sharded base: addresses of the weights that are views of files and will be copied
    mapped: frozenset[int] = frozenset()
    # for a meta model: whether load_model will read tensor by tensor, to pack or to copy the tensors
    packed_while_read: bool = False
    copied_while_read: bool = False
    read_alone: bool = True  # for a meta model: whether tunekit can read the files without transformers
    slots: SharedSlots | None = None  # of a streamed base, if several runs use it

    @property
    def head_modules(self) -> list[str]:
        """Names of the modules that the objective trains whole, with any adapter: the head, if the recipe trains
        one."""
        return list(dict.fromkeys([*self.new_modules, *self.family.trained_with(self.net)]))

    @property
    def positions(self) -> int | None:
        """The number of positions that the base has learned or states; None if it states none."""
        stated = None if self.text is None else self.text.positions
        counts = (self.family.learned_positions(self.net), stated)
        return min((count for count in counts if count is not None), default=None)


def as_loaded(base: LoadedBase) -> LoadedModel:
    """The base of a model that an objective gets; its interface names no class of this folder."""
    assert isinstance(base, LoadedModel)
    return base
