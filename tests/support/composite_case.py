"""Tiny composite models of nine families: transformers' class, and the names of tensors and files as on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForMultimodalLM

from tests.conftest import write_tiny_llama

TEXT: dict[str, Any] = {
    "vocab_size": 267,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PATCHES = {**TOWER, "image_size": 32, "patch_size": 8}
VISUAL = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
VISUAL |= {"patch_size": 4, "num_position_embeddings": 16}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
INTERLEAVED = {"rope_parameters": {**MROPE, "mrope_interleaved": True}}
WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
EXPERTS = {"intermediate_size_mlp": 48, "num_local_experts": 2, "interleave_moe_layer_step": 2}
# model type -> (text configuration, vision configuration, other values)
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "qwen2_5_vl": ({"rope_parameters": MROPE}, {**VISUAL, "window_size": 16, "fullatt_block_indexes": [1]}, {}),
    "qwen3_vl": (INTERLEAVED, {**VISUAL, "deepstack_visual_indexes": [0]}, {}),
    "qwen3_5": ({**INTERLEAVED, **LINEAR, "layer_types": ["linear_attention", "full_attention"]}, VISUAL, {}),
    "gemma3": (WINDOWS, PATCHES, {"mm_tokens_per_image": 4, "image_token_index": 262}),
    "gemma4": (
        {**WINDOWS, "global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 267}
        | {"num_kv_shared_layers": 0},
        {**TOWER, "num_key_value_heads": 4, "head_dim": 8, "patch_size": 4, "position_embedding_size": 64},
        {},
    ),
    "mistral3": ({"model_type": "mistral"}, {**PATCHES, "model_type": "pixtral", "head_dim": 8}, {}),
    "llama4": (
        {**EXPERTS, "no_rope_layers": [1, 0], "attention_chunk_size": 64},
        {**PATCHES, "intermediate_size": 128}
        | {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32},
        {},
    ),
    "llava": ({"model_type": "llama"}, {**PATCHES, "model_type": "clip_vision_model", "projection_dim": 32}, {}),
    "smolvlm": ({"model_type": "llama"}, PATCHES, {"scale_factor": 2}),
}
LANGUAGE = {"smolvlm": "model.text_model", "llama4": "language_model.model"}  # others: model.language_model
TOWERS = {"gemma3": "vision_tower.", "llava": "vision_tower."}  # whose tensors have `vision_model.` in their names
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def language_model(model_type: str) -> str:
    """The name of the language model in transformers' class."""
    return LANGUAGE.get(model_type, "model.language_model")


def make_composite(model_type: str) -> Any:
    """The model in float32 with seeded random weights, in eval mode."""
    text, vision, others = SHAPES[model_type]
    config = CONFIG_MAPPING[model_type](text_config={**TEXT, **text}, vision_config=vision, **others)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).eval()


def write_composite(model_type: str, folder: Path) -> Path:
    """The model's folder, with the byte-level tokenizer of the tiny llama, in two shards."""
    write_tiny_llama(folder)
    (folder / "model.safetensors").unlink()
    make_composite(model_type).save_pretrained(folder)
    tensors = {_hub_name(model_type, name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    if model_type == "qwen3_5":  # its head for several tokens, which transformers does not load
        tensors |= {f"mtp.{name}.weight": torch.randn(32, 32) for name in ("fc", "layers.0.mlp.up_proj")}
    (folder / "model.safetensors").unlink()
    _write_shards(folder, tensors)
    for name in PROCESSOR_FILES:
        (folder / name).write_text(json.dumps({"written_by": name}), encoding="utf-8")
    return folder


def _hub_name(model_type: str, name: str) -> str:
    tower = TOWERS.get(model_type)
    return name.replace(tower, f"{tower}vision_model.", 1) if tower and name.startswith(tower) else name


def _write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    names = sorted(tensors)
    files = {f"model-0000{number + 1}-of-00002.safetensors": names[number::2] for number in range(2)}
    for file, inside in files.items():
        save_file({name: tensors[name] for name in inside}, folder / file, {"format": "pt"})
    index = {name: file for file, inside in files.items() for name in inside}
    content = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")
