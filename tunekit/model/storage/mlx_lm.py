"""Rules about configurations with which mlx-lm 0.32.2 computes a model differently from transformers, or refuses it.

Every table was read from the files in mlx_lm/models of that version. A `type` is a model_type in config.json. The
`file` of a type is the file in mlx_lm/models that contains the model's code.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tunekit.model.storage.portable import LETTERS, PERIODS, all_parts, older_rope, period_of
from tunekit.model.storage.windows import sliding_window

ConfigPart = Mapping[str, Any]
PartRule = Callable[[str, ConfigPart], Iterator[str]]


def _types(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The activation function that each file always uses in feed-forward layers. Forms of GELU differ by less than 0.001.
ACTIVATIONS: tuple[tuple[frozenset[str], frozenset[str]], ...] = (
    (
        _types("silu swish"),
        _types("""
            cohere cohere2 deepseek deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5 ernie4_5_moe exaone exaone4
            exaone_moe falcon_h1 glm glm4 glm4_moe glm4_moe_lite granite granitemoe helium hunyuan hunyuan_v1_dense
            internlm3 lfm2 lfm2_moe llama longcat_flash mellum mimo minicpm minicpm3 minimax minimax_m2 ministral3
            mistral mistral4 mixtral nanbeige olmo2 olmo3 olmoe phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next
            seed_oss smollm3 solar_open stablelm telechat3 youtu_llm
        """),
    ),
    (
        _types("gelu gelu_fast gelu_new gelu_python gelu_pytorch_tanh"),
        _types("gemma gemma2 gemma3_text gpt2 gpt_bigcode gpt_neox gptj phi recurrent_gemma starcoder2"),
    ),
    (_types("relu2"), _types("bitnet nemotron")),
)
# Types whose file ignores rope_scaling (UNSCALED), or knows only some forms of scaling (SCALED)
UNSCALED = _types("""
    cohere cohere2 ernie4_5 ernie4_5_moe gemma gemma2 glm glm4 glm4_moe gpt_neox helium lfm2 lfm2_moe llama4_text
    minimax minimax_m2 mixtral phi qwen2_moe qwen3_moe qwen3_vl_moe_text recurrent_gemma stablelm starcoder2
""")
SCALED = {"deepseek": ("linear",), "nemotron": ("linear",), "phi3": ("linear", "longrope", "su")}
# Types that have a sliding window in transformers, but none in their file
WINDOWLESS = _types("""
    gemma2 mistral mixtral phi3 phimoe qwen2 qwen2_5_vl_text qwen2_moe qwen2_vl_text qwen3 qwen3_moe starcoder2
""")
# Keys that mlx-lm requires and that the configuration classes of transformers 5.24 do not write
REQUIRED = {
    "apertus": "mlp_bias post_norm qk_norm",
    "bailing_hybrid": "num_experts_per_tok n_group group_norm_size max_position_embeddings",
    "exaone": "num_layers layer_norm_epsilon",
    "exaone4": "head_dim",
    "exaone_moe": "head_dim is_moe_layer",
    "glm4_moe": "head_dim",
    "glm_moe_dsa": "topk_method scoring_func moe_layer_freq",
    "kimi_linear": "linear_attn_config",
    "lfm2": "block_dim",
    "longcat_flash": "attention_method zero_expert_type mla_scale_q_lora mla_scale_kv_lora",
    "mamba2": "intermediate_size",
    "mellum": "num_experts",
    "minimax": "shared_intermediate_size rotary_dim",
    "minimax_m2": "shared_intermediate_size rotary_dim",
    # key names of AI2's package hf_olmo
    "olmo": "d_model n_layers mlp_hidden_size n_heads embedding_size",
    "qwen3_moe": "num_experts head_dim",
    "qwen3_vl_moe_text": "num_experts head_dim",
    "solar_open": "intermediate_size first_k_dense_replace partial_rotary_factor",
    "step3p5": "num_attention_groups",
}
# For each type: settings with the only value that mlx-lm computes, and with transformers' default
FIXED: dict[str, tuple[tuple[str, object, object], ...]] = {
    "gemma3_text": (
        ("attn_logit_softcapping", None, None),
        ("final_logit_softcapping", None, None),
        ("use_bidirectional_attention", False, False),
    ),
    "gpt2": (("scale_attn_by_inverse_layer_idx", False, False), ("scale_attn_weights", True, True)),
    "gpt_neox": (("attention_bias", True, True),),
    "phimoe": (("attention_bias", True, False), ("lm_head_bias", True, False)),
    "qwen3": (("attention_bias", False, False),),
    "qwen3_moe": (("attention_bias", False, False),),
    "starcoder2": (("use_bias", True, True),),
}
FOUR_TIMES = {"gpt2": ("n_inner", "n_embd"), "gptj": ("n_inner", "n_embd"), "gpt_neox": ("intermediate_size",) * 2}
PACKED_ONLY = {"bitnet": "bitnet", "gpt_oss": "mxfp4"}  # mlx-lm reads only packed weights of these types
BOTH_KINDS = _types("exaone4 gpt_oss olmo3")  # types that need at least one layer of full attention
YARN_KEYS = ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
NEAR = 1e-3  # a relative difference of a factor that has no visible effect


def cannot(config: ConfigPart) -> Iterator[str]:
    """Messages about settings that mlx-lm computes wrongly, or because of which it refuses the model."""
    return _messages((_activation, _scaling, _yarn, _share, _pattern, _required, _fixed), config)


def limits(config: ConfigPart) -> Iterator[str]:
    """Messages about the text lengths for which mlx-lm computes the same as transformers."""
    return _messages((_window, _long_factors), config)


def _messages(rules: tuple[PartRule, ...], config: ConfigPart) -> Iterator[str]:
    return (message for place, part in all_parts(config) for rule in rules for message in rule(place, part))


def _kind(part: ConfigPart) -> str:
    return str(part.get("model_type"))


def _activation(place: str, part: ConfigPart) -> Iterator[str]:
    keys = ("hidden_activation", "hidden_act", "activation_function")
    key = next((key for key in keys if isinstance(part.get(key), str)), None)
    for names, types in ACTIVATIONS:
        if key is not None and _kind(part) in types and part[key] not in names:
            yield f"feed-forward layers use {min(names, key=len)} instead of {place}{key} {part[key]}"


def _rope_scaling(part: ConfigPart) -> tuple[str, ConfigPart]:
    """The type of the rotary embedding's scaling (`default`: no scaling), and the settings of this scaling."""
    scaling = older_rope(part).get("rope_scaling") or part.get("rope_scaling")
    if not isinstance(scaling, Mapping):
        return "default", {}
    return str(scaling.get("rope_type") or scaling.get("type") or "default"), scaling


def _scaling(place: str, part: ConfigPart) -> Iterator[str]:
    form, kind = _rope_scaling(part)[0], _kind(part)
    known = () if kind in UNSCALED else SCALED.get(kind)
    if known is not None and form not in (*known, "default", "mrope"):
        yield f"the {form} scaling in {place}rope_parameters is ignored, because mlx-lm's {kind} has no such scaling"


def _yarn(place: str, part: ConfigPart) -> Iterator[str]:
    form, scaling = _rope_scaling(part)
    if form != "yarn" or _kind(part) in UNSCALED or _kind(part) in SCALED:
        return
    nulls = [key for key in YARN_KEYS if key in scaling and scaling[key] is None]
    if nulls:
        yield f"the model is refused, because {nulls[0]} in {place}rope_parameters is null"
        return
    theirs, ours = _attention_factors(scaling)
    if abs(theirs - ours) > NEAR * abs(ours):
        yield f"yarn is computed with the attention factor {theirs:.4g} instead of {ours:.4g}"
    if scaling.get("truncate") is False:
        yield f"the limits of yarn's frequencies are rounded, although {place}rope_parameters has truncate: false"
    length = part.get("max_position_embeddings")
    if YARN_KEYS[0] not in scaling and length != 4096:
        yield f"yarn is computed with {YARN_KEYS[0]} 4096 instead of {length}"


def _attention_factors(scaling: ConfigPart) -> tuple[float, float]:
    """The two factors by which mlx-lm and transformers multiply queries and keys.

    Source: YarnRoPE in mlx_lm/models/rope_utils.py, _compute_yarn_parameters in transformers.
    """
    factor = _number(scaling.get("factor"), 1.0)
    log = 0.1 * math.log(factor) if factor > 1 else 0.0
    theirs = [1 + log * _number(scaling.get(key), default) for key, default in (("mscale", 1.0), ("mscale_all_dim", 0))]
    stated = scaling.get("attention_factor")
    both = scaling.get("mscale") and scaling.get("mscale_all_dim")
    ratio = theirs[0] / (theirs[1] or 1.0)
    return ratio, _number(stated, ratio if both else 1 + log)


def _number(value: object, default: float) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else default  # type: ignore[arg-type]


def _share(place: str, part: ConfigPart) -> Iterator[str]:
    rope = part.get("rope_parameters")
    share = rope.get("partial_rotary_factor") if isinstance(rope, Mapping) else None
    share = part.get("partial_rotary_factor", 0.5) if share is None else share
    if _kind(part) == "glm" and share != 1.0:
        yield f"all dimensions of each head are rotated, although {place}partial_rotary_factor is {share}"


def _pattern(place: str, part: ConfigPart) -> Iterator[str]:
    kind, kinds = _kind(part), part.get("layer_types")
    if kind in PERIODS and isinstance(kinds, list):
        period, theirs = period_of(kinds), part.get("sliding_window_pattern", PERIODS[kind])
        if period is None:
            yield f"{place}layer_types cannot be computed: mlx-lm's {kind} gives full attention to every Nth layer only"
        elif period != theirs:
            yield f"one of every {theirs} layers has full attention, but {place}layer_types has one of every {period}"
    if kind in LETTERS and isinstance(part.get("sliding_window_pattern"), int) and part["sliding_window_pattern"]:
        yield f"the model is refused: {place}sliding_window_pattern is a number, but mlx-lm needs letters such as LLLG"
    if kind in BOTH_KINDS and isinstance(kinds, list) and set(map(str, kinds)) == {"sliding_attention"}:
        yield f"the model is refused: mlx-lm needs a layer with full attention, but {place}layer_types has none"


def _required(place: str, part: ConfigPart) -> Iterator[str]:
    kind = _kind(part)
    missing = [key for key in REQUIRED.get(kind, "").split() if part.get(key) is None]
    if missing:
        yield f"the model is refused: mlx-lm's {kind} needs {', '.join(place + key for key in missing)}"
    packed = part.get("quantization_config")
    method = packed.get("quant_method") if isinstance(packed, Mapping) else None
    if kind in PACKED_ONLY and method != PACKED_ONLY[kind]:
        yield f"the model is refused: mlx-lm's {kind} reads only weights in the format {PACKED_ONLY[kind]}"


def _fixed(place: str, part: ConfigPart) -> Iterator[str]:
    kind = _kind(part)
    for key, only, default in FIXED.get(kind, ()):
        value = part.get(key, default)
        if (value or None) != (only or None):
            yield f"{place}{key} is {value}, but mlx-lm's {kind} computes only {only}"
    if kind in FOUR_TIMES:
        key, hidden = FOUR_TIMES[kind]
        hidden = "hidden_size" if hidden == key else hidden
        size, width = part.get(key), part.get(hidden)
        if isinstance(size, int) and isinstance(width, int) and size != 4 * width:
            yield f"the model is refused: {place}{key} is {size}, but mlx-lm's {kind} always uses 4 times {hidden}"
    if kind == "gemma2" and any(
        part.get(key, 1) is None for key in ("attn_logit_softcapping", "final_logit_softcapping")
    ):
        yield "the model is refused: mlx-lm's gemma2 needs soft caps"


def _window(place: str, part: ConfigPart) -> Iterator[str]:
    window = sliding_window(part)
    if _kind(part) in WINDOWLESS and window is not None:
        yield f"results are right up to {window} tokens: mlx-lm ignores the sliding window"


def _long_factors(place: str, part: ConfigPart) -> Iterator[str]:
    form, scaling = _rope_scaling(part)
    if form not in ("longrope", "su") or scaling.get("short_factor") == scaling.get("long_factor"):
        return
    length = part.get("original_max_position_embeddings", scaling.get("original_max_position_embeddings"))
    yield f"results are right only above {length} tokens: mlx-lm uses the long factors of {form} for every length"
