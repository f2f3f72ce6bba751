"""Settings that have a fixed value in llama.cpp's code for an architecture. A GGUF file does not contain them."""

from collections.abc import Callable, Mapping
from typing import Any

Configuration = Mapping[str, Any]  # a model's configuration

# model type -> layers of a group, where the file does not state the number; the last layer has full attention
GROUPS = {"gemma2": 2, "gemma3_text": 6, "gpt_oss": 2}


def _gemma_scale(config: Configuration) -> object:
    """query_pre_attn_scalar as llama.cpp computes it: the width of a head, or for the 27B models the hidden size
    divided by the number of heads."""
    is_27b = config.get("num_hidden_layers") in (46, 62)
    return config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]


def _without_positions(config: Configuration) -> object:
    """For each layer, 1 if it uses rotary positions, else 0. Every fourth layer uses none."""
    return [int((layer + 1) % 4 != 0) for layer in range(config["num_hidden_layers"])]


def _last_of(count: int, others: str) -> Callable[[Configuration], object]:
    """Make a function that returns the layer types: full attention in every `count`-th layer, and the type `others` in
    all other layers."""

    def types(config: Configuration) -> object:
        layers = range(config["num_hidden_layers"])
        return [others if (layer + 1) % count else "full_attention" for layer in layers]

    return types


def _exaone_window(config: Configuration) -> object:
    """The sliding window of the 32B model (64 layers); None for the other models, which have no windows."""
    return config["sliding_window"] if config["num_hidden_layers"] == 64 else None


# model type -> setting -> the value that llama.cpp takes
FIXED: dict[str, dict[str, Callable[[Configuration], object]]] = {
    "gemma2": {"query_pre_attn_scalar": _gemma_scale},
    "gemma3_text": {
        "query_pre_attn_scalar": _gemma_scale,
        "attn_logit_softcapping": lambda config: None,
        "use_bidirectional_attention": lambda config: False,
    },
    "afmoe": {"mup_enabled": lambda config: True, "layer_types": _last_of(4, "sliding_attention")},
    "qwen2_moe": {"norm_topk_prob": lambda config: False},
    "qwen3_moe": {"norm_topk_prob": lambda config: True},
    "gpt2": {
        "n_inner": lambda config: 4 * config["n_embd"],
        "scale_attn_weights": lambda config: True,
        "scale_attn_by_inverse_layer_idx": lambda config: False,
    },
    "falcon": {
        "alibi": lambda config: False,
        "parallel_attn": lambda config: True,
        "ffn_hidden_size": lambda config: 4 * config["hidden_size"],
        "bias": lambda config: False,
    },
    "phi": {"intermediate_size": lambda config: 4 * config["hidden_size"]},
    "bloom": {"apply_residual_connection_post_layernorm": lambda config: False},
    "smollm3": {"no_rope_layers": _without_positions},
    "llama4_text": {
        "no_rope_layers": _without_positions,
        "layer_types": _last_of(4, "chunked_attention"),
        "attention_chunk_size": lambda config: 8192,
        "attn_temperature_tuning": lambda config: True,
        "floor_scale": lambda config: 8192,
        "attn_scale": lambda config: 0.1,
    },
    "gemma3n_text": {
        "layer_types": _last_of(5, "sliding_attention"),
        "num_kv_shared_layers": lambda config: config["num_hidden_layers"] - 20,
        "hidden_size_per_layer_input": lambda config: 256,
        "altup_num_inputs": lambda config: 4,
        "altup_active_idx": lambda config: 0,
        "laurel_rank": lambda config: 64,
    },
    "exaone4": {"sliding_window": _exaone_window},
    "cohere": {"use_qk_norm": lambda config: config["num_hidden_layers"] >= 64},
}
