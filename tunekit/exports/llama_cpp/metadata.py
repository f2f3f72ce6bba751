"""Metadata that llama.cpp reads but its converter does not write, and the text length up to which it is correct."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from tunekit.errors import ModelError
from tunekit.exports.llama_cpp.fixed import group_size
from tunekit.exports.settings import complete_config
from tunekit.model.storage.llama_cpp import GROUPS
from tunekit.model.storage.windows import sliding_window

# the types whose windows llama.cpp has; it gives all others full attention
WINDOWED = frozenset(
    (
        *("gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gpt_oss", "cohere2", "olmo3", "exaone4"),
        *("afmoe", "cohere2_moe", "exaone_moe", "laguna", "llama4_text", "mellum", "mimo_v2"),
    )
)
OWN_SCALING = ("hunyuan_v1_dense", "hunyuan_v1_moe")  # the converter computes theirs
# facts that are true of a type, and that its configuration does not state
ALWAYS: dict[str, dict[str, int]] = {
    "afmoe": {"expert_weights_norm": True},
    "exaone_moe": {"expert_gating_func": 2},  # sigmoid
}
FACTORS = {"llama3": "rope_freqs", "longrope": "rope_factors_long"}  # kind of scaling -> tensor with its factors


class FactsWriter(Protocol):
    """The methods of the converter's writer that add one value to the file's metadata."""

    arch: str
    tensors: list[dict[str, Any]]
    kv_data: list[dict[str, Any]]

    def add_context_length(self, length: int) -> None: ...
    def add_rope_freq_base(self, value: float) -> None: ...
    def add_rope_scaling_factor(self, value: float) -> None: ...
    def add_rope_scaling_orig_ctx_len(self, value: int) -> None: ...
    def add_bool(self, key: str, value: bool) -> None: ...
    def add_string(self, key: str, value: str) -> None: ...
    def add_float32(self, key: str, value: float) -> None: ...
    def add_uint32(self, key: str, value: int) -> None: ...


def right_up_to(config: Mapping[str, Any]) -> tuple[int, str] | None:
    """The number of tokens up to which llama.cpp computes the same as the model, and the name of the feature that it
    ignores in longer texts. None if llama.cpp ignores no such feature."""
    config = complete_config(config)
    kind, rope, window = str(config.get("model_type")), config.get("rope_parameters") or {}, sliding_window(config)
    limits = [] if window is None or kind in WINDOWED else [(window, "the sliding window")]
    if rope.get("rope_type") == "dynamic" and kind not in OWN_SCALING:
        length = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        limits.append((int(length), "dynamic scaling of positions"))
    return min(limits, default=None)


def limit_notes(config: Mapping[str, Any]) -> Iterator[str]:
    """Notes for the user: the length up to which llama.cpp is correct; and for gpt-oss, that llama.cpp rounds the
    bounds of yarn."""
    if (limit := right_up_to(config)) is not None:
        yield f"right for up to {limit[0]:,} tokens: llama.cpp ignores {limit[1]}"
    config = complete_config(config)
    if config.get("model_type") == "gpt_oss" and (config.get("rope_parameters") or {}).get("truncate") is False:
        what = "llama.cpp rounds the bounds of yarn, but this base does not (truncate is false)"
        yield f"{what}: the answers differ, and more so in long texts"


def complete_facts(writer: FactsWriter, config: Mapping[str, Any]) -> None:
    """Add metadata that the converter leaves out: rotary positions, groups of layers with sliding windows, and a
    context length up to which llama.cpp is correct. `writer` must already have the names of the tensors.

    Raises: ModelError for a scaling of positions that the converter does not write.
    """
    if (limit := right_up_to(config)) is not None:
        writer.add_context_length(limit[0])
    config = complete_config(config)
    kind, types = str(config.get("model_type")), config.get("layer_types")
    size = group_size(types) if kind in GROUPS and types else None
    if size not in (None, GROUPS.get(kind)):
        writer.add_uint32(f"{writer.arch}.attention.sliding_window_pattern", size)
    for name, value in ALWAYS.get(kind, {}).items():
        if isinstance(value, bool):
            writer.add_bool(f"{writer.arch}.{name}", value)
        else:
            writer.add_uint32(f"{writer.arch}.{name}", value)
    rope = config.get("rope_parameters") or {}
    _complete_positions(writer, rope.get("full_attention") or rope)


def _complete_positions(writer: FactsWriter, rope: Mapping[str, Any]) -> None:
    """Add the base theta and the scaling of rotary positions."""
    prefix, kind, facts = f"{writer.arch}.rope", rope.get("rope_type"), writer.kv_data[0]
    if "rope_theta" in rope and f"{prefix}.freq_base" not in facts:
        writer.add_rope_freq_base(rope["rope_theta"])
    if kind in ("linear", "yarn"):
        writer.add_string(f"{prefix}.scaling.type", kind)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        ratio = _yarn_scale(rope) / _log_scale(rope["factor"])  # llama.cpp multiplies by the divisor itself
        if abs(ratio - 1) > 1e-6 and f"{prefix}.scaling.yarn_log_multiplier" not in facts:
            writer.add_float32(f"{prefix}.scaling.attn_factor", ratio)
    if kind in FACTORS and not any(name.startswith(FACTORS[kind]) for name in writer.tensors[0]):
        what = f"llama.cpp's converter does not write the {kind} scaling of positions that {writer.arch} uses"
        raise ModelError(what, "choose another --to")


def _yarn_scale(rope: Mapping[str, Any]) -> float:
    """The factor by which yarn multiplies sines and cosines, as transformers computes it."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    factor, above, below = rope["factor"], rope.get("mscale"), rope.get("mscale_all_dim")
    return _log_scale(factor, above) / _log_scale(factor, below) if above and below else _log_scale(factor)


def _log_scale(factor: float, weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
