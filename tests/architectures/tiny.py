"""Tiny random models of every model type of transformers that writes text: a model type goes in, a folder with a
byte-level tokenizer out.

The default configuration of a type is made small by the names of its settings, in all sections of a composite model.
Lists with one entry for each layer keep one layer of each kind. Facts that names do not show are in OWN, by section.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from tests.conftest import write_tiny_llama
from tunekit.model.parts import composite_classes
from tunekit.model.unsupported import REASON_OF

VOCABULARY, HIDDEN, LAYERS, MOST_LAYERS = 267, 64, 2, 5
PLACEHOLDER = 262  # the id of every token that stands for a picture or a recording; no text has it
LAYER_COUNTS = (
    "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth num_encoder_layers"
    " num_decoder_layers num_layers_per_stack n_input_layers n_recurrent_layers n_output_layers num_global_layers"
    " conf_num_hidden_layers num_blocks decoder_num_layers num_adapter_layers projector_layers"
)
SAME: tuple[tuple[int, str], ...] = (  # a value, and the names under which configurations have it
    (VOCABULARY, "vocab_size vocab_size_per_layer_input decoder_vocab_size audio_vocab_size ngram_vocab_size_base"),
    (
        HIDDEN,
        "hidden_size d_model n_embd embed_dim word_embed_proj_dim embedding_size dim emb_dim out_hidden_size"
        " hidden_size_global text_hidden_size vision_hidden_size projection_dim projector_hidden_size output_dim"
        " vision_output_dim projector_input_dim projector_output_dim encoder_hidden_size mm_hidden_size"
        " input_embedding_size output_embedding_size output_channels projection_hidden_size backbone_hidden_size"
        " lru_width multimodal_hidden_size output_proj_dims pooler_output_size audio_embed_dim mm_embed_dim",
    ),
    (
        128,
        "intermediate_size ffn_dim n_inner ffn_hidden_size d_inner dim_ff encoder_ffn_dim decoder_ffn_dim dff d_ff"
        " intermediate_size_mlp dense_intermediate_size shared_intermediate_size mlp_dim feed_forward_size"
        " dense_ffn_hidden_size projection_intermediate_size alignment_intermediate_size decoder_intermediate_size"
        " merged_hidden_size",
    ),
    (LAYERS, LAYER_COUNTS),
    (
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_local_experts"
        " num_experts n_routed_experts moe_num_experts time_step_rank mamba_dt_rank n_mamba_heads attention_heads"
        " swa_num_attention_heads conf_num_attention_heads num_sliding_attention_heads"
        " num_encoder_attention_heads num_decoder_attention_heads kv_n_heads index_topk hc_lowrank",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads num_experts_per_tok moe_k num_experts_per_token moe_topk eos_token_id"
        " num_experts_per_layer expert_layer_period swa_num_key_value_heads num_global_key_value_heads top_k_experts"
        " index_num_kv_heads moe_top_k num_query_groups global_num_key_value_heads",
    ),
    (
        16,
        "index_n_heads head_dim kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim attention_head_dim d_kv"
        " rotary_dim swa_head_dim swa_v_head_dim index_head_dim global_head_dim linear_key_head_dim"
        " linear_value_head_dim attention_head_size d_head dim_head swa_qk_rope_head_dim swa_qk_nope_head_dim d_rel"
        " gated_norm_rank short_conv_rank o_lora_rank adapter_rank hidden_size_per_layer_input sliding_window"
        " sliding_window_size rel_extent attention_chunk_size attention_window_size local_attention",
    ),
    (
        512,
        "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length context_length seq_length"
        " max_target_positions",
    ),
    (
        64,
        "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size expert_dim"
        " moe_hidden_size expert_ffn_hidden_size share_expert_dim expert_intermediate_size"
        " router_hidden_size position_embedding_size"
        " latent_dim lightning_hidden_size codebook_size num_embeddings max_image_size downsample_channels",
    ),
    (32, "base_channels kv_lora_rank q_lora_rank swa_q_lora_rank image_size ple_embed_dim"),
    (1, "n_group topk_group first_k_dense_replace n_shared_experts bos_token_id num_shared_experts"),
    (0, "pad_token_id"),
    (8, "state_size mamba_d_state ssm_state_size patch_size zero_expert_num split_ngram_parts"),
)
VALUES = {name: value for value, names in SAME for name in names.split()}
STATES = {"mamba_n_heads": 8, "mamba_chunk_size": 16}  # of Mamba 2's kind: 8 heads of 16
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
ALWAYS = {  # names that get a value although the default is None
    *("num_key_value_heads", "eos_token_id", "bos_token_id", "pad_token_id", "head_dim"),
    *("n_group", "topk_group", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size"),
}
MULTI_HEAD = {"num_key_value_heads": 4}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SECTIONS = {"rope_parameters": {**ROPE, "mrope_section": [4, 2, 2]}}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
OWN: dict[str, dict[str, Any]] = {
    "apertus1p5": {"image_token_offset": 267, "audio_token_offset": 331},
    "apertus1p5_text": {"vocab_size": 400},
    "apertus1p5_vision_tokenizer": {"channel_multiplier": [1, 1], "num_res_blocks": 1, "spatial_scale_factor": 2},
    "bailing_hybrid": {"num_expert_group": 1, "num_experts": 4, "linear_head_dim": 16, "linear_num_heads": 4},
    "bamba": {**STATES, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    "chameleon": {"vocabulary_map": {"<image>": PLACEHOLDER}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "cosmos3_edge_text": SECTIONS,
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [64, 64], "global_attn_indexes": [1]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], **MULTI_HEAD},
    "deepseek_v2": MULTI_HEAD,
    "deepseek_v3": {"n_group": 2},
    "doge": MULTI_HEAD,
    "dots3_note_text": {f"swa_{name}": 16 for name in ("qk_nope_head_dim", "v_head_dim", "kv_lora_rank", "q_lora_rank")}
    | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 32},
    "dots3_note_vision_encoder": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN, "adapter_merge_size": 2}
    | {"mlp_layer_types": ["dense", "sparse"], "num_hidden_layers": 2},
    "dots3_note_audio_encoder": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN, "downsample_hidden_size": 32},
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1}
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "emu3": {"vocabulary_map": {"<image>": PLACEHOLDER}},
    "emu3_vqgan": {"channel_multiplier": [1, 1], "hidden_size": 32},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]},
        "moe_intermediate_size": [64, 32],
    },
    "falcon_h1": {**STATES, "mamba_d_ssm": 128},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    }
    | {"layer_types": ["sliding_attention", "full_attention"] * 2, "laurel_rank": 8, "intermediate_size": 128},
    "gemma3n_vision": {"architecture": "test_efficientnet", "vocab_size": 8, "vocab_offset": 250},
    "gemma4_text": {"global_head_dim": 16, "num_kv_shared_layers": 2, "num_hidden_layers": 4, "enable_moe_block": True}
    | {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_experts": 4, "top_k_experts": 2}
    | {"moe_intermediate_size": 64, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "gemma4_unified_text": {"global_head_dim": 16, "num_global_key_value_heads": 1},
    "glm4v_text": SECTIONS,
    "glm4v_moe_text": {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}},
    "glm5_next_text": {
        "index_kpool": 2,
        "qk_rope_head_dim": 0,
        "head_dim": 0,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
    },
    "glm_ocr_text": SECTIONS,
    "gpt_neo": {"attention_types": [[["global"], 1], [["local"], 1]]},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1], "downsample_rate": "1/2"},
    "granitemoehybrid": {**STATES, "layer_types": ["mamba", "attention"]},
    "hrm_text": {"num_hidden_layers": 4 * 2 * 2, "H_cycles": 2, "L_cycles": 2},
    "hunyuan_vl_text": {"rope_parameters": {**ROPE, "mrope_section": [2, 2, 2, 2]}},
    "hunyuan_vl_vision": {"max_image_size": 64, "min_image_size": 32, "img_max_token_num": 16},
    "hy_v4_vl_text": SECTIONS,
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY - 5},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCABULARY - 5},
    "inkling_audio": {"n_mel_bins": 8, "mel_vocab_size": 8},
    "inkling_vision": {"patch_size": 40, "n_layers": 3},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "janus_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "latent_channels": 32},
    "kimi_linear": {"linear_head_dim": 16, "linear_num_heads": 4},
    "kolibri1_1": {"index_layers": [1], "kv_source_layers": [0, 1], "mlp_only_layers": [0], "index_num_heads": 2}
    | {"mlp_only_intermediate_size": 64},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "chunk_size": 8},
    "mllama_text_model": {"cross_attention_layers": [1], "num_hidden_layers": 3},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2]},
    "muse_spark_audio": {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_hidden_layers": 4},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "chunk_size": 16},
    "paddleocr_vl_text": SECTIONS,
    "phi3": {"original_max_position_embeddings": 2, "rope_parameters": LONG_ROPE},
    "phi4_multimodal_audio": {
        "ext_pw_out_channel": 64,
        "depthwise_separable_out_channel": 64,
        "nemo_conv_channels": 32,
    },
    "pp_formulanet_vision": {"post_conv_in_channels": 64, "post_conv_mid_channels": 64, "post_conv_out_channels": 64},
    "qwen2_vl_text": SECTIONS,
    "qwen2_5_vl_text": SECTIONS,
    "qwen2_5_omni_text": SECTIONS,
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_omni_moe_audio_encoder": {"downsample_hidden_size": 32},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8}
    | {"indexer_compress_ratio": 2, "ple_layer_ids": [1], "split_ngram_parts": 2, "hc_lowrank": 16},
    "radio": {"max_img_size": 64, "video_temporal_patch_size": 2},
    "recurrent_gemma": {"block_types": ("recurrent", "attention")},
    "reformer": {"is_decoder": True, "axial_pos_shape": (16, 32), "axial_pos_embds_dim": (32, 32)},
    "roc_bert": {"shape_vocab_size": 267, "pronunciation_vocab_size": 267, "shape_embed_dim": 16}
    | {"pronunciation_embed_dim": 16},
    "rwkv": {"attention_hidden_size": HIDDEN},
    "starcoder2": {"sliding_window": 16},
    "step3p5": {"sliding_window": 64, "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "timm_wrapper": {"architecture": "test_vit", "model_args": {"embed_dim": 64}, "hidden_size": HIDDEN},
    "unlimited_ocr_sam_vision_model": {"downsample_channels": [64, 64], "global_attn_indexes": [1]},
    "wavtokenizer_encoder": {"codebook_dim": HIDDEN, "decoder_hidden_size": HIDDEN, "num_filters": 4},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},  # its cache takes queries of 64 and more
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "chunk_size": 16},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str, layers: int = LAYERS) -> Any:
    """The type's configuration with small values; `layers`: at least this number."""
    return _shrunk(CONFIG_MAPPING[model_type](), layers)


def _shrunk(default: Any, layers: int) -> Any:
    """A small configuration of the same class and inner types as the default one."""
    kind = type(default)
    values = dict(_small_values(default, layers))
    kept = _kept_layers(default, layers)
    if kept:
        count, lists = kept
        values |= lists | {name: count for name in LAYER_COUNTS.split() if name in kind.__dataclass_fields__}
    if "kv_lora_rank" in values:
        values |= MULTI_HEAD
    return kind(**(values | _repeated(OWN.get(default.model_type, {}), int(values.get("num_hidden_layers", layers)))))


def _repeated(values: dict[str, Any], layers: int) -> dict[str, Any]:
    """The values, with lists that have an entry for each of `layers` layers."""
    types = values.get("layer_types", [])
    if types and "num_hidden_layers" not in values:
        values = values | {"layer_types": (types * layers)[: max(layers, len(types))]}
    if "attention_types" in values:
        values = values | {"attention_types": values["attention_types"] * (layers // 2)}
    return values


def _small_values(default: Any, layers: int) -> Iterator[tuple[str, Any]]:
    kind, counts = type(default), LAYER_COUNTS.split()
    for name in kind.__dataclass_fields__:
        meaning = kind.attribute_map.get(name, name)
        if meaning in counts:
            yield name, layers
            continue
        value = vars(default).get(meaning)
        if hasattr(value, "to_dict"):
            yield name, _shrunk(value, layers)
        elif meaning in VALUES and (value is not None or meaning in ALWAYS):
            yield name, VALUES[meaning] if not isinstance(value, list | tuple) else [VALUES[meaning]] * len(value)
        elif "drop" in name and isinstance(value, float):
            yield name, 0.0
        elif name.endswith(("_id", "_index", "_ids")) and isinstance(value, int) and value >= VOCABULARY:
            yield name, PLACEHOLDER
        elif value is None and isinstance(kind.__dataclass_fields__[name].default, int | float):
            yield name, None  # the outer type's choice


def _kept_layers(default: Any, layers: int) -> tuple[int, dict[str, list[Any]]] | None:
    """The number of kept layers, and the lists with one entry for each of them: the first layer of each kind, and the
    following ones if these are fewer than `layers`."""
    count = getattr(default, "num_hidden_layers", None)
    lists = {
        name: list(value)
        for name in type(default).__dataclass_fields__
        if isinstance(value := vars(default).get(name), list | tuple) and count and len(value) == count
    }
    if not lists:
        return None
    rows = [[value[number] for value in lists.values() if isinstance(value[number], str)] for number in range(count)]
    first = sorted({row: number for number, row in reversed([*enumerate(map(str, rows))])}.values())[:MOST_LAYERS]
    more = [number for number in range(count) if number not in first][: max(0, layers - len(first))]
    kept = sorted([*first, *more])
    return len(kept), {name: [value[number] for number in kept] for name, value in lists.items()}


PROMISED = frozenset(Path(__file__).with_name("names.txt").read_text("utf-8").split())  # the types that must be right


def model_types() -> dict[str, str]:
    """The class of each model type that transformers lists for causal language models or for images and text, as
    config.json names it."""
    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return dict(sorted(names.items()))


def make_tiny(model_type: str, layers: int = LAYERS) -> nn.Module:
    """The model in float32 with seeded random weights, in eval mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = tiny_config(model_type, layers)
        torch.manual_seed(0)
        net: nn.Module = getattr(transformers, model_types()[model_type])._from_config(config, dtype=torch.float32)
        perturb(net)
    return net.eval()


def perturb(net: nn.Module) -> None:
    """Give values that are no zeros and ones to norms, biases, sinks and stored buffers, and larger ones to weights."""
    with torch.no_grad():
        for tensor in {id(tensor): tensor for tensor in net.state_dict(keep_vars=True).values()}.values():
            if tensor.is_meta:
                continue
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor += 0.1 * torch.randn(tensor.shape)
            elif tensor.is_floating_point() and float(tensor.std()) < 0.03:
                tensor *= 4


def write_tiny(model_type: str, folder: Path, layers: int = LAYERS) -> Path:
    """The model's folder, with the byte-level tokenizer and template of the tiny llama."""
    write_tiny_llama(folder)
    if model_type in REASON_OF:  # refused before its weights are read
        config = {"model_type": model_type, "architectures": [model_types()[model_type]]}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder
    (folder / "model.safetensors").unlink()
    make_tiny(model_type, layers).save_pretrained(folder)
    if model_types()[model_type] in composite_classes():
        (folder / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    return folder
