"""A net cut into embed, layers, final norm, so that an engine can run it layer by layer.

Comes in: the base of a causal net and its list of layers.  Goes out: Stages, or None where the cut is unproven.
Next: memory/streaming.py. The embed stage runs the base's own forward with recorders in place of the layers, so that
masks and position embeddings are made by the model's own code, whatever its version.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tunekit.model.families.structure import call_accepted
from tunekit.protocols import Stages

# Families on which tests compare stages with the plain forward bit for bit.
PROVEN = frozenset(
    [
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "cohere", "granite", "phi3"),
        *("olmo2", "smollm3", "starcoder2", "mixtral", "gpt_neox", "gpt2", "phi", "opt", "bloom"),
    ]
)
NORM_NAMES = ("norm", "ln_f", "final_layernorm", "final_layer_norm")
TUPLE_LAYERS = frozenset(["bloom"])  # whose layers give (hidden, ...), and whose bases take the first


class _Recorder(nn.Module):
    """Stands in for a layer: notes what it is called with and hands the hidden states on."""

    def __init__(self, layer: nn.Module, in_tuple: bool) -> None:
        super().__init__()
        self.in_tuple = in_tuple
        object.__setattr__(self, "layer", layer)  # not a child: it must not be moved or saved twice
        self.arguments: tuple[Any, ...] = ()
        self.keywords: dict[str, Any] = {}
        self.hidden: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        self.hidden, self.arguments, self.keywords = hidden, arguments, keywords
        return (hidden, None) if self.in_tuple else hidden

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "layer"), name)


class StageLayer(nn.Module):
    """One layer, called with the arguments that the embed stage recorded for it."""

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        self.layer, self.index = layer, index

    def forward(self, hidden: torch.Tensor, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> torch.Tensor:
        arguments, keywords = calls[self.index]
        output = self.layer(hidden, *arguments, **keywords)
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def make_stages(base: nn.Module, layers_name: str, layers: nn.ModuleList, config: Any) -> Stages | None:
    """Stages of a base whose layers lie in `layers`; None for families that no test has compared."""
    parent = base.get_submodule(layers_name.split(".", 1)[1].rpartition(".")[0])
    norm_name = next((name for name in NORM_NAMES if isinstance(getattr(parent, name, None), nn.Module)), None)
    if config.model_type not in PROVEN or norm_name is None:
        return None
    attribute = layers_name.rpartition(".")[2]

    def embed(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
        recorders = nn.ModuleList(_Recorder(layer, config.model_type in TUPLE_LAYERS) for layer in layers)
        setattr(parent, attribute, recorders)
        try:
            call_accepted(base, inputs)
        finally:
            setattr(parent, attribute, layers)
        hidden: Any = recorders[0].hidden  # (B, T, D)
        return hidden, {"calls": [(recorder.arguments, recorder.keywords) for recorder in recorders]}

    def finish(hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = getattr(parent, norm_name)(hidden)  # (B, T, D)
        return result

    return Stages(embed, [StageLayer(layer, index) for index, layer in enumerate(layers)], finish)
