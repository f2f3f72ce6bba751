"""Each decoder layer's self-attention: its module, its key heads and its window."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from tunekit.errors import ModelError
from tunekit.model.families.structure import name_of
from tunekit.model.pretrained import as_pretrained, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

KEY = "adapter.method"
CACHE_NAMES = ("cache", "layer_past", "past_key_values")
MASK_NAMES = ("attention_mask", "mask")


@dataclass(frozen=True)
class SelfAttention:
    """One layer's self-attention: H key and value heads of width D. `window`: the size of its sliding window in tokens;
    None: all earlier tokens."""

    name: str
    module: nn.Module
    layer: int
    heads: int
    width: int
    window: int | None = None


def self_attentions(net: nn.Module) -> list[SelfAttention]:
    """The self-attention of every decoder layer, in order.

    Raises: ModelError with the reason if the model does not allow learned keys and values before its tokens.
    """
    config = getattr(decoder(net), "config", None) or text_config(net)
    modules: dict[int, tuple[str, nn.Module]] = {}
    for name, module in decoder(net).named_modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and layer not in modules and parameter_of(module, CACHE_NAMES) is not None:
            modules[layer] = name, module  # a layer's cross-attention comes after its self-attention
    if not modules or not all(getattr(module, "is_causal", True) for _, module in modules.values()):
        raise no_way_in(config, "it has no causal self-attention")
    if sorted(modules) != list(range(int(config.num_hidden_layers))):
        raise no_way_in(config, f"only {len(modules)} of its {config.num_hidden_layers} layers have attention")
    prefix = name_of(net, decoder(net))
    attentions = [
        _attention(config, f"{prefix}.{name}".lstrip("."), module, layer)
        for layer, (name, module) in sorted(modules.items())
    ]
    sizes = {(attention.heads, attention.width) for attention in attentions}
    if len(sizes) > 1 or getattr(config, "num_kv_shared_layers", None):
        raise no_way_in(config, "not all of its layers have separate keys of one size")
    return attentions


def decoder(net: nn.Module) -> nn.Module:
    """The module that computes positions and masks for the decoder layers."""
    return as_pretrained(net).get_decoder() if hasattr(net, "get_decoder") else net


def _attention(config: PreTrainedConfig, name: str, module: nn.Module, layer: int) -> SelfAttention:
    """Find the number of heads, their width and the window of one layer's attention module.

    Raises: ModelError for a kind of layer that does not work with prefixes.
    """
    parameters = parameters_of(module)
    bias = "position_bias" in parameters and not hasattr(module, "compute_bias")
    # since transformers 5.25, Falcon's attention reads the bias in its mask
    if bias or getattr(config, "alibi", "alibi" in parameters):
        raise no_way_in(config, "its positions are an attention bias of fixed size")
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[layer] not in ("full_attention", "sliding_attention"):
        raise no_way_in(config, f"it has layers with {kinds[layer]}")
    window = getattr(config, "sliding_window", None)
    varied = getattr(config, "per_layer_config", None)
    heads, width = heads_and_width(config if varied is None else varied[layer])
    attention = SelfAttention(name, module, layer, heads, width, None if kinds and "full" in kinds[layer] else window)
    for projection in ("k_proj", "k"):
        outputs = getattr(getattr(module, projection, None), "out_features", heads * width)
        if outputs != heads * width:
            raise no_way_in(config, f"{name} has {outputs} outputs, not {heads} heads of width {width}")
    return attention


def attention_sizes(net: nn.Module, layers: int) -> list[tuple[int, int, int]]:
    """(query heads, key heads, width of a head) of each of `layers` layers. Empty for a base without attention, such as
    Mamba. In a few bases, such as Gemma 4, layers differ."""
    config = text_config(net)
    varied = getattr(config, "per_layer_config", None) or ()
    # an encoder-decoder has more layers than its configuration lists
    of_layers = [varied[layer] if layer < len(varied) else config for layer in range(layers)]
    attentive = [each for each in of_layers if hasattr(each, "num_attention_heads")]
    return [(int(each.num_attention_heads), *heads_and_width(each)) for each in attentive]


def heads_and_width(config: PreTrainedConfig) -> tuple[int, int]:
    """The number of key and value heads, and the width of a head."""
    queries = int(config.num_attention_heads)
    heads = int(getattr(config, "num_key_value_heads", None) or queries)
    width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or int(config.hidden_size) // queries
    return heads, int(width)


def no_way_in(config: PreTrainedConfig, why: str) -> ModelError:
    """The error for a family that cannot have learned keys and values before its tokens, with the reason."""
    what = f"{config.model_type} cannot have learned keys and values before its tokens: {why}"
    return ModelError(what, "choose another adapter.method, such as lora or prompt", key=KEY)


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """Parameter names of the module's `forward` method, in order."""
    return tuple(inspect.signature(module.forward).parameters)


def parameter_of(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """The first of `names` that is a parameter of the module's `forward` method; None if there is none."""
    return next((name for name in names if name in parameters_of(module)), None)
