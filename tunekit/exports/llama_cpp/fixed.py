"""Settings of architectures that llama.cpp fixes: a GGUF file cannot state them, so other values would be ignored."""

from collections.abc import Callable, Mapping
from typing import Any

from tunekit.errors import Problem
from tunekit.model.base_spec import default_config

Configuration = Mapping[str, Any]  # a model's configuration
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")  # the names of this setting
# names of one activation in llama.cpp, which has one GELU for both of its formulas
SAME = (("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python", "gelu"))


def _gemma_scale(config: Configuration) -> object:
    """The width of heads, by which llama.cpp scales attention; for the 27B models the mean width."""
    is_27b = config.get("num_hidden_layers") in (46, 62)
    return config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]


# model type -> setting -> the value that llama.cpp takes
FIXED: dict[str, dict[str, Callable[[Configuration], object]]] = {
    "gemma2": {"query_pre_attn_scalar": _gemma_scale},
    "gemma3_text": {"query_pre_attn_scalar": _gemma_scale, "attn_logit_softcapping": lambda config: None},
    "qwen2_moe": {"norm_topk_prob": lambda config: False},
    "qwen3_moe": {"norm_topk_prob": lambda config: True},
    "gpt2": {"n_inner": lambda config: 4 * config["n_embd"], "scale_attn_weights": lambda config: True},
    "falcon": {
        "alibi": lambda config: False,
        "parallel_attn": lambda config: True,
        "ffn_hidden_size": lambda config: 4 * config["hidden_size"],
    },
}


def fixed_problems(config: Configuration) -> list[Problem]:
    """The settings with which llama.cpp would compute something else. It has the default activation of every type."""
    config = config | config["text_config"] if isinstance(config.get("text_config"), Mapping) else config
    kind = str(config.get("model_type"))
    defaults, wrong = default_config(kind), []
    for name in ACTIVATIONS:
        taken: tuple[str, ...] = next(
            (names for names in SAME if defaults.get(name) in names), (defaults.get(name, ""),)
        )
        if None not in (config.get(name), defaults.get(name)) and config[name] not in taken:
            wrong.append((name, config[name], " or ".join(taken)))
    for name, expected in FIXED.get(kind, {}).items():
        if config.get(name) is not None and config[name] != expected(config):
            wrong.append((name, config[name], str(expected(config))))
    return [
        Problem(f"{name} is {value} in this base, and llama.cpp computes with {taken}", "choose another --to")
        for name, value, taken in wrong
    ]
