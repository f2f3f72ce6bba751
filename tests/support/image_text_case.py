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
from tests.support.composite_case import INTERLEAVED, LINEAR, MROPE, PATCHES, TEXT, VISUAL, WINDOWS

VOCABULARY = 320
SIDE = 32  # pixels of a tile
VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TILE_TOKENS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
TILE_TOKENS += [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
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
}
LLAMA = {"model_type": "llama"}
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
    "llava": (LLAMA, {**PATCHES, "model_type": "clip_vision_model", "projection_dim": 32}, {"image_seq_length": 16}),
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
    tiles = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    if model_type == "idefics3":
        return transformers.Idefics3Processor(transformers.Idefics3ImageProcessor(**tiles), tokenizer, image_seq_len=4)
    images, videos = transformers.SmolVLMImageProcessor(**tiles), transformers.SmolVLMVideoProcessor()
    return transformers.SmolVLMProcessor(images, tokenizer, videos, image_seq_len=4)


def write_image_text(model_type: str, folder: Path, *, marked: bool = False) -> Path:
    """A model's folder with its processor."""
    write_tiny_llama(folder)
    added, features, _ = TOKENS[model_type]
    named = {"extra_special_tokens": GEMMA_TOKENS} if model_type == "gemma3" else {}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **named)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *added]})
    tokenizer.chat_template = template(model_type, marked=marked)
    processor = make_processor(model_type, tokenizer)
    processor.chat_template = tokenizer.chat_template
    processor.save_pretrained(folder)
    token_id = tokenizer.convert_tokens_to_ids(features)
    text, vision, others = SHAPES[model_type]
    text = {**TEXT, **text, "vocab_size": VOCABULARY}
    image = {"image_token_index" if model_type in ("gemma3", "llava") else "image_token_id": token_id}
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
