"""Tiny models that read images and text, with processors of transformers' classes, and rows of images and text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import CONFIG_MAPPING, AutoModelForMultimodalLM, PreTrainedTokenizerFast

from tests.conftest import write_tiny_llama
from tests.support.composite_case import INTERLEAVED, LINEAR, MROPE, PATCHES, TEXT, TOWER, VISUAL, WINDOWS

VOCABULARY = 320
SIDE = 32  # pixels of a tile
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TILE_TOKENS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
TILE_TOKENS += [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
GEMMA4_TOKENS = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>"}
GEMMA4_TOKENS |= {"boa_token": "<|audio>", "eoa_token": "<audio|>", "audio_token": "<|audio|>"}
CONTEXT_TOKENS = {"start_image_token": "<img>", "end_image_token": "</img>"}
CONTEXT_TOKENS |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
GEMMA_TOKENS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
GLM_TOKENS = ["<|begin_of_image|>", "<|end_of_image|>", "<|image|>"]
GLM_TOKENS += ["<|begin_of_video|>", "<|end_of_video|>", "<|video|>"]
QWEN = (VISION_TOKENS, "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>")
TOKENS = {  # model type -> its further tokens, the token at features, what the template writes for an image
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"), QWEN),
    "glm4v": (GLM_TOKENS, "<|image|>", "<|begin_of_image|><|image|><|end_of_image|>"),
    "gemma3": (list(GEMMA_TOKENS.values()), "<image_soft_token>", "<start_of_image>"),
    "llava": (["<image>"], "<image>", "<image>"),
    "idefics3": (TILE_TOKENS, "<image>", "<image>"),
    "smolvlm": ([*TILE_TOKENS, "<video>"], "<image>", "<image>"),
    "llava_next": (["<image>"], "<image>", "<image>"),
    "llava_onevision": (["<image>", "<video>"], "<image>", "<image>"),
    "mistral3": (["[IMG]", "[IMG_BREAK]", "[IMG_END]"], "[IMG]", "[IMG]"),
    "internvl": ([*CONTEXT_TOKENS.values()], "<IMG_CONTEXT>", "<IMG_CONTEXT>"),
    "paligemma": (["<image>", "<bos>"], "<image>", "<image>"),
    "gemma4": ([*GEMMA4_TOKENS.values(), "<|video|>"], "<|image|>", "<|image|>"),
}
# configurations that call the token's id image_token_index
INDEXED = ("gemma3", "llava", "llava_next", "llava_onevision", "mistral3", "paligemma")
NAMED_TOKENS = {"gemma3": GEMMA_TOKENS, "gemma4": GEMMA4_TOKENS, "internvl": CONTEXT_TOKENS}
LLAMA = {"model_type": "llama"}
CLIP = {**PATCHES, "model_type": "clip_vision_model", "projection_dim": 32}
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": (
        {"rope_parameters": MROPE},
        {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4},
        {},
    ),
    "qwen3_vl": ({**INTERLEAVED, "num_hidden_layers": 3}, {**VISUAL, "deepstack_visual_indexes": [0, 1]}, {}),
    "qwen3_5": ({**INTERLEAVED, **LINEAR, "layer_types": ["linear_attention", "full_attention"]}, VISUAL, {}),
    "glm4v": (
        {"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}},
        {**VISUAL, "num_heads": 2, "image_size": 32},
        {},
    ),
    "qwen2_5_vl": ({"rope_parameters": MROPE}, {**VISUAL, "window_size": 16, "fullatt_block_indexes": [1]}, {}),
    "gemma3": (WINDOWS, PATCHES, {"mm_tokens_per_image": 4}),
    "llava": (LLAMA, CLIP, {"image_seq_length": 16}),
    "llava_next": (LLAMA, CLIP, {"image_grid_pinpoints": PINPOINTS}),
    "llava_onevision": (
        {"model_type": "qwen2"},
        {**PATCHES, "model_type": "siglip_vision_model", "vision_use_head": False},
        {"image_grid_pinpoints": PINPOINTS, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    ),
    "mistral3": (
        {"model_type": "mistral"},
        {**PATCHES, "image_size": 64, "model_type": "pixtral", "head_dim": 8},
        {"vision_feature_layer": -1, "spatial_merge_size": 2},
    ),
    "internvl": (
        {"model_type": "qwen2"},
        {**TOWER, "image_size": [SIDE, SIDE], "patch_size": [8, 8]},
        {"image_seq_length": 4},
    ),
    "paligemma": (
        {"model_type": "gemma", "vocab_size": 1600},
        {**PATCHES, "model_type": "siglip_vision_model", "vision_use_head": False},
        {"projection_dim": 32, "hidden_size": 32, "vocab_size": 1600},
    ),
    "gemma4": (
        {**WINDOWS, "global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
        | {"num_kv_shared_layers": 0, "use_bidirectional_attention": "vision"},
        {**TOWER, "num_key_value_heads": 4, "head_dim": 8, "patch_size": 4, "position_embedding_size": 64},
        {},
    ),
    "idefics3": (LLAMA, PATCHES, {"scale_factor": 2}),
    "smolvlm": (LLAMA, PATCHES, {"scale_factor": 2}),
}
CONTENT = (
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>"
)
MARKED = "{% if message.role == 'assistant' %}{% generation %}CONTENT{% endgeneration %}{% else %}CONTENT{% endif %}"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "TURN{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def template(model_type: str, *, marked: bool = False) -> str:
    """The chat template. `marked`: with {% generation %} blocks, which TRL needs."""
    turn = MARKED.replace("CONTENT", CONTENT) if marked else CONTENT
    return TEMPLATE.replace("TURN", turn).replace("IMAGE", TOKENS[model_type][2])


def make_processor(model_type: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The processor of transformers' class."""
    tile = {"height": SIDE, "width": SIDE}
    grid = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    pixels = {"shortest_edge": 64, "longest_edge": 1024}
    if model_type in ("qwen2_vl", "qwen2_5_vl"):
        kind = {"qwen2_vl": transformers.Qwen2VLProcessor, "qwen2_5_vl": transformers.Qwen2_5_VLProcessor}[model_type]
        images = transformers.Qwen2VLImageProcessor(size=pixels, **grid)
        return kind(images, tokenizer, transformers.Qwen2VLVideoProcessor())
    if model_type in ("qwen3_vl", "qwen3_5"):
        images = transformers.Qwen2VLImageProcessor(size=pixels, **grid)
        return transformers.Qwen3VLProcessor(images, tokenizer, transformers.Qwen3VLVideoProcessor())
    if model_type == "glm4v":
        pixels = {name: 2 * count for name, count in pixels.items()}  # this processor counts two frames
        images = transformers.Glm4vImageProcessor(size=pixels, **grid)
        return transformers.Glm4vProcessor(images, tokenizer, transformers.Glm4vVideoProcessor())
    if model_type == "gemma3":
        return transformers.Gemma3Processor(transformers.Gemma3ImageProcessor(size=tile), tokenizer, image_seq_length=4)
    if model_type == "llava":
        images = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=tile)
        return transformers.LlavaProcessor(images, tokenizer, 8, "default", num_additional_image_tokens=1)
    if model_type == "llava_next":
        sizes = {"size": {"shortest_edge": SIDE}, "crop_size": tile, "image_grid_pinpoints": PINPOINTS}
        images = transformers.LlavaNextImageProcessor(**sizes)
        return transformers.LlavaNextProcessor(images, tokenizer, 8, "default", num_additional_image_tokens=1)
    if model_type == "llava_onevision":
        images = transformers.LlavaOnevisionImageProcessor(size=tile, image_grid_pinpoints=PINPOINTS)
        videos = transformers.LlavaOnevisionVideoProcessor()
        return transformers.LlavaOnevisionProcessor(images, tokenizer, videos, 16, "full")
    if model_type == "mistral3":
        images = transformers.PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8})
        return transformers.PixtralProcessor(images, tokenizer, patch_size=8, spatial_merge_size=2)
    if model_type == "internvl":
        images = transformers.GotOcr2ImageProcessor(size=tile, crop_to_patches=True, min_patches=1, max_patches=4)
        return transformers.InternVLProcessor(images, tokenizer, transformers.InternVLVideoProcessor(), 4)
    if model_type == "paligemma":
        images = transformers.SiglipImageProcessor(size=tile, image_seq_length=16)
        tokenizer.bos_token = "<bos>"
        return transformers.PaliGemmaProcessor(images, tokenizer)
    if model_type == "gemma4":
        images = transformers.Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70)
        sounds, videos = transformers.Gemma4AudioFeatureExtractor(), transformers.Gemma4VideoProcessor()
        return transformers.Gemma4Processor(sounds, images, tokenizer, videos)
    tiles = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    if model_type == "idefics3":
        return transformers.Idefics3Processor(transformers.Idefics3ImageProcessor(**tiles), tokenizer, image_seq_len=4)
    images, videos = transformers.SmolVLMImageProcessor(**tiles), transformers.SmolVLMVideoProcessor()
    return transformers.SmolVLMProcessor(images, tokenizer, videos, image_seq_len=4)


def write_image_text(model_type: str, folder: Path, *, marked: bool = False) -> Path:
    """A model's folder with its processor."""
    write_tiny_llama(folder)
    added, features, _ = TOKENS[model_type]
    named = {"extra_special_tokens": NAMED_TOKENS[model_type]} if model_type in NAMED_TOKENS else {}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **named)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *added]})
    if model_type == "gemma4":  # whose processor always pads
        tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = template(model_type, marked=marked)
    processor = make_processor(model_type, tokenizer)
    processor.chat_template = tokenizer.chat_template
    processor.save_pretrained(folder)
    token_id = tokenizer.convert_tokens_to_ids(features)
    text, vision, others = SHAPES[model_type]
    text = {**TEXT, "vocab_size": VOCABULARY, **text}
    image = {"image_token_index" if model_type in INDEXED else "image_token_id": token_id}
    config = CONFIG_MAPPING[model_type](text_config=text, vision_config=vision, **image, **others)
    assert config.image_token_id == token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def write_images(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Images of noise, of different sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers, paths = np.random.default_rng(seed), []
    for number in range(count):
        height, width = numbers.integers(20, 70, 2)
        pixels = numbers.integers(0, 256, (height, width, 3), np.uint8)
        paths.append(folder / f"{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def image_row(number: int, images: Sequence[str]) -> dict[str, Any]:
    """A conversation with these images between the words of its first question, and a later turn."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": f"look {number}"}]
    for image in images:
        parts += [{"type": "image", "image": image}, {"type": "text", "text": " and "}]
    turns = [
        ("user", parts),
        ("assistant", f"so {'very ' * (number % 3)}{number}"),
        ("user", "why"),
        ("assistant", "ok"),
    ]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write_image_rows(folder: Path, rows: int = 10) -> Path:
    """train.jsonl: rows with 0 to 2 images, whose paths are relative to it."""
    paths = iter(write_images(folder / "images", 2 * rows))
    lines = []
    for number in range(rows):
        images = [f"images/{next(paths).name}" for _ in range((1, 2, 0, 1)[number % 4])]
        lines.append(json.dumps(image_row(number, images)) + "\n")
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "train.jsonl"
