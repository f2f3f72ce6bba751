"""Settings of architectures that llama.cpp fixes: a GGUF file cannot state them, so other values would be ignored."""

from collections.abc import Iterator, Sequence

from tunekit.errors import Problem
from tunekit.exports.settings import Ignored, complete_config, ignored_problems
from tunekit.model.base_spec import default_config
from tunekit.model.storage.llama_cpp import FIXED, GROUPS, Configuration

ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")  # the names of this setting
# names of one activation in llama.cpp, which has one GELU for both of its formulas
SAME = (("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python", "gelu"))
YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
# model type -> whether llama.cpp has the biases of this setting; of a type that is not named it has them if they exist
NO_BIAS = (
    *("arcee", "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "olmo3", "olmoe"),
    *("qwen3", "qwen3_moe", "smollm3"),
)
BIASES: dict[str, dict[str, bool]] = {kind: {"attention_bias": False, "mlp_bias": False} for kind in NO_BIAS} | {
    "ernie4_5": {"use_bias": False},
    "gpt_neox": {"attention_bias": True},
    "gpt_oss": {"attention_bias": True},
    "jais2": {"attention_bias": True, "mlp_bias": True},
    "lfm2": {"conv_bias": False},
    "phi": {"qk_layernorm": False},
    "seed_oss": {"attention_out_bias": False, "mlp_bias": False},
    "starcoder2": {"use_bias": True},
}
NEEDED = {  # numbers, where None would mean "none"
    "gemma2": ("attn_logit_softcapping", "final_logit_softcapping"),
    "gemma4_text": ("final_logit_softcapping",),
}


def fixed_problems(config: Configuration) -> list[Problem]:
    """Settings of the model that llama.cpp would ignore, such as an activation that is not the model type's default."""
    config = complete_config(config)
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
    wrong += [
        (name, config[name], str(taken))
        for name, taken in BIASES.get(kind, {}).items()
        if config.get(name, taken) not in (taken, None)
    ]
    wrong += [(name, None, "a number") for name in NEEDED.get(kind, ()) if config.get(name) is None]
    wrong += _position_problems(kind, config)
    return ignored_problems("llama.cpp", wrong)


def _position_problems(kind: str, config: Configuration) -> Iterator[Ignored]:
    """Sliding windows and rotary positions that llama.cpp would compute differently."""
    types = config.get("layer_types")
    if kind in GROUPS and types and group_size(types) is None:
        grouped = "full attention only in the last layer of each group, with groups of equal size"
        yield "layer_types", f"[{', '.join(types)}]", grouped
    rope = config.get("rope_parameters") or {}
    sliding, full = rope.get("sliding_attention") or {}, rope.get("full_attention") or rope
    if full.get("rope_type") == "yarn":
        for name, taken in YARN.items():
            # gpt-oss has exact bounds; llama.cpp, its main program, rounds them
            if full.get(name, taken) not in (taken, None) and (kind, name) != ("gpt_oss", "truncate"):
                yield name, full[name], str(taken)
    if sliding.get("rope_type", "default") != "default" and kind != "gemma4_text":
        yield "rope_type", f"{sliding['rope_type']} for layers with a window", "default"
    if kind == "olmo3" and sliding.get("rope_theta") != full.get("rope_theta"):
        yield "rope_theta", f"{sliding.get('rope_theta')} for layers with a window", f"{full.get('rope_theta')}"


def group_size(types: Sequence[str]) -> int | None:
    """The number of layers per group, if only the last layer of each group has full attention; None if layers are in
    another order."""
    full = [kind != "sliding_attention" for kind in types]
    size = full.index(True) + 1 if any(full) else len(full) + 1
    return size if full == [(layer + 1) % size == 0 for layer in range(len(full))] else None
