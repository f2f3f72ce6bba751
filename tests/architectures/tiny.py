"""Tiny random models of transformers' architectures: a model type goes in, a folder with a byte-level tokenizer out.

A configuration gets small values under every name that it has; what an architecture needs beyond them is in OWN.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.conftest import write_tiny_llama

VOCABULARY, HIDDEN, LAYERS = 267, 64, 2
LAYER_COUNTS = "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers"
SAME: tuple[tuple[int, str], ...] = (  # a value, and the names under which configurations have it
    (VOCABULARY, "vocab_size"),
    (HIDDEN, "hidden_size d_model n_embd embed_dim word_embed_proj_dim embedding_size dim"),
    (
        128,
        "intermediate_size ffn_dim n_inner ffn_hidden_size d_inner dim_ff encoder_ffn_dim decoder_ffn_dim"
        " intermediate_size_mlp dense_intermediate_size shared_intermediate_size",
    ),
    (LAYERS, LAYER_COUNTS),
    (
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_local_experts"
        " num_experts n_routed_experts moe_num_experts time_step_rank mamba_dt_rank n_mamba_heads",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads num_experts_per_tok moe_k num_experts_per_token moe_topk eos_token_id"
        " num_experts_per_layer expert_layer_period",
    ),
    (16, "head_dim kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim attention_head_dim d_kv rotary_dim"),
    (512, "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length context_length seq_length"),
    (
        64,
        "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size expert_dim"
        " sliding_window lru_width",
    ),
    (32, "kv_lora_rank q_lora_rank"),
    (1, "n_group topk_group first_k_dense_replace n_shared_experts bos_token_id num_shared_experts"),
    (0, "pad_token_id"),
    (8, "state_size mamba_d_state ssm_state_size"),
)
VALUES = {name: value for value, names in SAME for name in names.split()}
STATES = {"mamba_n_heads": 8, "mamba_chunk_size": 16}  # of Mamba 2's kind: 8 heads of 16
MIXED = {"layer_types": ["linear_attention", "full_attention"]} | {
    f"linear_{name}": size
    for name, size in (("key_head_dim", 16), ("value_head_dim", 16), ("num_key_heads", 2), ("num_value_heads", 4))
}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {**STATES, "attn_layer_indices": [1]},
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "doge": {"num_key_value_heads": 4},
    "falcon_h1": {**STATES, "mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global"], 1], [["local"], 1]]},
    "granitemoehybrid": {**STATES, "layer_types": ["mamba", "attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "chunk_size": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCABULARY},
    "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 16},
    "longcat_flash": {"num_layers": 1, "ffn_hidden_size": 128, "expert_ffn_hidden_size": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "chunk_size": 16},
    "zamba": {"layer_types": ["mamba", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "chunk_size": 16},
    "recurrent_gemma": {"block_types": ("recurrent", "attention")},
    "reformer": {"is_decoder": True},
    "qwen3_next": MIXED,
    "qwen3_5_text": MIXED,
    "rwkv": {"attention_hidden_size": HIDDEN},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},  # its cache takes queries of 64 and more
    "minicpm3": {"num_key_value_heads": 4},
    "youtu": {"num_key_value_heads": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
}


def tiny_config(model_type: str, layers: int = LAYERS) -> Any:
    """The architecture's configuration with small values; `layers`: an even number."""
    kind: Any = CONFIG_MAPPING[model_type]
    known = set(getattr(kind, "__dataclass_fields__", {}))
    small = VALUES | dict.fromkeys(LAYER_COUNTS.split(), layers)
    values: dict[str, Any] = {name: value for name, value in small.items() if name in known - set(kind.attribute_map)}
    values |= {name: 0.0 for name in known if "drop" in name and isinstance(getattr(kind, name, None), float)}
    for name, value in OWN.get(model_type, {}).items():
        of_layers = isinstance(value, list) and len(value) == LAYERS
        values[name] = value * (layers // LAYERS) if of_layers else value
    return kind(**values)


def make_tiny(model_type: str, layers: int = LAYERS) -> nn.Module:
    """The model in float32 with seeded random weights, in eval mode."""
    torch.manual_seed(0)
    net: nn.Module = AutoModelForCausalLM.from_config(tiny_config(model_type, layers), dtype=torch.float32)
    return net.eval()


def write_tiny(model_type: str, folder: Path, layers: int = LAYERS) -> Path:
    """The model's folder, with the byte-level tokenizer and template of the tiny llama."""
    write_tiny_llama(folder)
    (folder / "model.safetensors").unlink()
    make_tiny(model_type, layers).save_pretrained(folder)
    return folder
