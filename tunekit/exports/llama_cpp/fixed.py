"""Settings of architectures that llama.cpp fixes: a GGUF file cannot state them, so other values would be ignored."""

from collections.abc import Callable, Mapping
from typing import Any

from tunekit.errors import Problem

Configuration = Mapping[str, Any]  # a model's configuration
SILU = ("silu", "swish")
TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python")
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")  # the names of this setting
# model type -> the activations that llama.cpp computes; it has one GELU for both of its formulas
EXPECTED = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi3", "olmo2", "smollm3"), SILU),
    **dict.fromkeys(("granite", "lfm2", "lfm2_moe"), SILU),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_neox", "starcoder2", "falcon"), (*TANH, "gelu")),
}


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
    """The settings with which llama.cpp would compute something else."""
    config = config | config["text_config"] if isinstance(config.get("text_config"), Mapping) else config
    kind = str(config.get("model_type"))
    wrong = [
        (name, config[name], " or ".join(EXPECTED[kind]))
        for name in ACTIVATIONS
        if config.get(name) is not None and kind in EXPECTED and config[name] not in EXPECTED[kind]
    ]
    for name, expected in FIXED.get(kind, {}).items():
        if config.get(name) is not None and config[name] != expected(config):
            wrong.append((name, config[name], str(expected(config))))
    return [
        Problem(f"{name} is {value} in this base, and llama.cpp computes with {taken}", "choose another --to")
        for name, value, taken in wrong
    ]
