"""What a family of models has in common: where its layers, its head and its hidden states are.

Comes in: a net as transformers builds it.  Goes out: `Family`, found by structure, not by class names.
Next: objectives/ read hidden states and head, memory/ and training/ read layers and stages.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tunekit.errors import ModelError
from tunekit.model.heads import TextHead, make_head
from tunekit.model.stages import make_stages
from tunekit.protocols import Stages


@dataclass(frozen=True)
class Family:
    """Causal language models: tokens in, hidden states (B, T, D), a head (D) -> (V)."""

    name: str = "causal"

    def layers(self, net: nn.Module) -> list[tuple[str, nn.Module]]:
        """The decoder layers in order, with their module names."""
        name, layers = _find_layers(net)
        return [(f"{name}.{index}", layer) for index, layer in enumerate(layers)]

    def hidden(self, net: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, T, D) hidden states after the final norm; no head, no cache, no full logits.

        Of `inputs` (input_ids or inputs_embeds, position_ids, attention_mask) the base takes what it accepts.
        """
        base = net.get_submodule(base_name(net))
        accepted = _accepted(base)
        taken = {key: value for key, value in inputs.items() if key in accepted}
        switches = {"use_cache": False} if "use_cache" in accepted else {}
        output = base(**taken, **switches)
        return output[0] if isinstance(output, tuple) else output.last_hidden_state  # type: ignore[no-any-return]

    def takes_positions(self, net: nn.Module) -> bool:
        """Whether the base accepts position ids; without them rows cannot be packed or padded on the left."""
        return "position_ids" in _accepted(net.get_submodule(base_name(net)))

    def head(self, net: nn.Module) -> TextHead:
        """The output projection, with its scale and soft cap."""
        name = self.head_name(net)
        if name is None:
            raise ModelError(f"{type(net).__name__} has no output projection", "choose a causal language model")
        return make_head(net, name, text_config(net))

    def head_name(self, net: nn.Module) -> str | None:
        """Module name of the output projection."""
        return _name_of(net, _call(net, "get_output_embeddings"))

    def embedding_name(self, net: nn.Module) -> str | None:
        """Module name of the token embedding."""
        return _name_of(net, _call(net, "get_input_embeddings"))

    def tied(self, net: nn.Module) -> bool:
        """Whether the head and the token embedding are one matrix."""
        head, embedding = self.head_name(net), self.embedding_name(net)
        if head is None or embedding is None:
            return False
        ours = getattr(net.get_submodule(head), "weight", None)
        return ours is not None and ours is getattr(net.get_submodule(embedding), "weight", None)

    def stages(self, net: nn.Module) -> Stages | None:
        """The net cut for layer-by-layer execution, equal to the plain forward bit for bit; None where unproven."""
        name, layers = _find_layers(net)
        return make_stages(net.get_submodule(base_name(net)), name, layers, text_config(net))


def text_config(net: nn.Module) -> Any:
    """The configuration of the text model."""
    config: Any = net.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def base_name(net: nn.Module) -> str:
    """Module name of the net without its head."""
    prefix: Any = getattr(net, "base_model_prefix", "")
    if not prefix or not isinstance(getattr(net, str(prefix), None), nn.Module):
        raise ModelError(
            f"{type(net).__name__} has no base model apart from its head", "choose a causal language model"
        )
    return str(prefix)


def _call(net: nn.Module, method: str) -> Any:
    return getattr(net, method)()


def _accepted(base: nn.Module) -> frozenset[str]:
    """Names that the base's forward declares; what it would swallow as **kwargs does not count."""
    return frozenset(inspect.signature(base.forward).parameters)


def _name_of(net: nn.Module, wanted: Any) -> str | None:
    """The name under which a module hangs in the net, also where an adapter has been put around it."""
    if wanted is None:
        return None
    return next((name for name, module in net.named_modules(remove_duplicate=False) if module is wanted), None)


def _find_layers(net: nn.Module) -> tuple[str, nn.ModuleList]:
    """The ModuleList that holds as many layers as the configuration says, nearest to the root."""
    count = int(text_config(net).num_hidden_layers)
    prefix = base_name(net)
    found = [
        (name, module)
        for name, module in net.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and name.startswith(prefix + ".")
    ]
    if not found:
        raise ModelError(
            f"{type(net).__name__} has no list of {count} decoder layers", "choose a decoder-only language model"
        )
    return min(found, key=lambda pair: pair[0].count("."))
