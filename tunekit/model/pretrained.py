"""Types for nets and configurations of transformers, and for the classes that make nets and configurations."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Literal, Protocol

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class AutoClass(Protocol):
    """One of transformers' Auto classes, such as AutoModelForCausalLM: it makes or loads the nets of one task."""

    __name__: str
    _model_mapping: Mapping[type, type[nn.Module]]

    def from_config(self, config: PreTrainedConfig, **settings: object) -> nn.Module:
        """The net with random values."""

    def from_pretrained(
        self, folder: str, *, output_loading_info: Literal[True], trust_remote_code: bool, **settings: object
    ) -> tuple[nn.Module, Mapping[str, Collection[object]]]:
        """The net with the folder's weights, and the names of missing and unexpected tensors."""


def as_pretrained(net: nn.Module) -> PreTrainedModel:
    """The same net, typed with the methods that transformers adds."""
    return net


def input_embedding(net: nn.Module) -> nn.Module | None:
    """The module that embeds the net's inputs; None if the net's class does not declare one (convolutional nets)."""
    try:
        return as_pretrained(net).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def config_of(net: nn.Module) -> PreTrainedConfig:
    """The net's configuration."""
    return as_pretrained(net).config


def text_config(net: nn.Module) -> PreTrainedConfig:
    """The configuration of the text model."""
    config = config_of(net)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
